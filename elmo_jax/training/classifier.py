"""Training of the BiLSTM classifier on the layers of a language model or on word vectors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, BatchStream, Documents
from elmo_jax.models.classifier import BiLSTMClassifier, Features, classifier_loss
from elmo_jax.models.lstm import token_mask
from elmo_jax.parallel import Plan, check_memory
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.evaluate import classification, evaluate
from elmo_jax.training.loop import fit
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState

OnEpoch = Callable[[int, Mapping[str, Any], Mapping[str, Any]], object]


class FeatureSource(NamedTuple):
    """Token features, the input of a classifier.

    Attributes:
        features: ``(params, batch, key) -> [L, B, T, F]``.
        params: Parameters of the features.
        shape: (L, F).
    """

    features: Features
    params: dict[str, Any]
    shape: tuple[int, int]


@dataclass(frozen=True)
class ClassifierTraining:
    """Model and settings of a classifier's training.

    Attributes:
        source: Token features.
        combiner: Combiner module.
        model: Classifier module.
        optimizer: Optimizer and schedule.
        epochs: Passes over the training documents.
        seed: Random seed for initialization and dropout.
        finetune: Train the parameters of the features too.
        standardize: Standardize each feature of each layer over the training tokens.
    """

    source: FeatureSource
    combiner: Any
    model: BiLSTMClassifier
    optimizer: OptimizerConfig
    epochs: int
    seed: int = 0
    finetune: bool = False
    standardize: bool = True

    def init_network(self) -> dict[str, Any]:
        """Initialize the parameters of the combiner and the classifier."""
        layers, features = self.source.shape

        @jax.jit
        def init(key: Array) -> dict[str, Any]:
            combiner_key, classifier_key = jax.random.split(key)
            x = jnp.zeros((layers, 1, 1, features))
            x, combiner = self.combiner.init_with_output(combiner_key, x)
            classifier = self.model.init(classifier_key, x, jnp.ones(1, jnp.int32))
            return {"combiner": combiner.get("params", {}), "classifier": classifier["params"]}

        key = jax.random.key(self.seed)
        check_memory(jax.eval_shape(init, key))
        return init(key)

    def run(
        self,
        train: BatchStream,
        validation: Documents,
        run: Run,
        mesh: Mesh | None = None,
        on_epoch: OnEpoch = lambda epoch, metrics, record: None,
        on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Train, and return the record of every epoch and all parameters of the best one.

        Args:
            train: Training batches.
            validation: Documents whose loss, "val_loss", tells the best epoch.
            run: Folder to save and log to.
            mesh: Devices; None uses the default one.
            on_epoch: Called with the number of the epoch, its summed metrics and its record.
            on_record: See `fit`.
        """
        loss_fn = classifier_loss(self.source.features, self.combiner, self.model)
        params = self.init_network()
        if self.standardize:
            params["standardizer"] = feature_statistics(self.source, train)
        frozen: Any = self.source.params
        if self.finetune:
            params, frozen = params | frozen, {}
        frozen = Plan(lambda frozen: frozen, mesh, (frozen,))()
        optimizer = make_optimizer(self.optimizer, self.epochs * train.steps_per_epoch)
        held_out = train.like(validation)
        metrics_fn = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])

        def record_epoch(state: TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
            validated = evaluate(metrics_fn, {**state.frozen, **state.params}, held_out)
            lambdas = self.combiner.lambdas(state.params["combiner"])
            record = {
                "train_accuracy": float(np.trace(metrics["confusion"]) / metrics["documents"]),
                "val_loss": float(validated["nll"] / validated["documents"]),
                "val_accuracy": classification(validated["confusion"])["accuracy"],
                "lambdas": None if lambdas is None else np.asarray(lambdas, np.float64).round(6).tolist(),
            }
            on_epoch(int(state.step) // train.steps_per_epoch, metrics, record)
            return record

        _, records = fit(
            Plan(lambda params: TrainState.create(params, optimizer), mesh, (params,)),
            loss_fn,
            optimizer,
            train,
            run,
            epochs=self.epochs,
            seed=self.seed,
            on_epoch=record_epoch,
            on_record=on_record,
            frozen=frozen,
        )
        best = run.restore_best(("params",))["params"]
        return records, {**frozen, **Plan(lambda best: best, mesh, (best,))()}


def feature_statistics(source: FeatureSource, stream: BatchStream) -> dict[str, Array]:
    """Return mean and inverse standard deviation of each feature over the words of a stream.

    Returns:
        "mean" and "scale", float32 ``[L, F]``.
    """
    documents = stream.documents

    @jax.jit
    def compute_sums(params: Any, batch: Batch) -> dict[str, Array]:
        x = source.features(params, batch, None)[:, :, 1:-1].astype(jnp.float32)  # [L, B, T, F]
        mask = token_mask(jnp.maximum(batch.lengths - 2, 0), x.shape[2])
        x = jnp.where(mask[:, :, None], x, 0)
        return {"words": mask.sum(), "sum": x.sum((1, 2)), "squares": jnp.square(x).sum((1, 2))}

    sums = evaluate(compute_sums, source.params, stream.like(documents))
    statistics = feature_standardizer(int(sums["words"]), sums["sum"], sums["squares"])
    return {name: jnp.asarray(value) for name, value in statistics.items()}


def feature_standardizer(count: int, total: np.ndarray, squares: np.ndarray) -> dict[str, np.ndarray]:
    """Return "mean" and "scale", the inverse standard deviation, of features, as float32.

    Args:
        count: Number of vectors.
        total: Sum of the vectors.
        squares: Sum of their squares.
    """
    mean = total / max(count, 1)
    variance = np.maximum(squares / max(count, 1) - mean**2, 0)
    # A feature that is constant up to rounding must not be blown up to variance 1.
    scale = 1 / np.sqrt(variance + 1e-6 * mean**2 + 1e-8)
    return {"mean": np.asarray(mean, np.float32), "scale": np.asarray(scale, np.float32)}
