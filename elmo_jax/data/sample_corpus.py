"""Sample corpus of short news-like texts in four classes, generated from a seeded grammar.

A text has one clause, or two of different classes, or names two parties of different classes. The main
clause gives the class, or the party that acts in it; a clause after a subordinator ("while", "a day after")
does not, so counting words does not solve the task.
In the templates ``{x}`` is a random entry of list x, and ``bank|river`` is the word "bank" in the
sense "river".
"""

import random
import re
from typing import NamedTuple

CLASSES = ("World", "Sports", "Business", "Sci/Tech")

_SYLLABLES = "ka lo mer tin vas dor el bri nu san gar fi os ren ta mo lin dra hal ves".split()  # noqa: SIM905

_LISTS = {
    "number": ["two", "three", "four", "five", "six", "seven", "nine", "ten", "twelve", "fifteen", "twenty", "forty"],
    "ordinal": ["second", "third", "fourth", "fifth", "sixth"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "place": ["north", "south", "east", "west", "coast", "capital", "border", "valley", "island"],
    "act": ["criticised", "sued", "praised", "accused", "blocked", "defended", "betrayed", "funded"],
    "issue": ["the delay", "a contract", "a leaked letter", "new rules", "the ticket price", "a broken promise"],
    # World
    "leader": ["the president", "the prime minister", "the foreign minister", "a senior envoy", "the governor", "the opposition leader", "a rebel commander", "the interior minister"],
    "state": ["the government", "parliament", "the ruling party", "the army", "the coalition", "the security council", "the embassy"],
    "unrest": ["clashes", "protests", "floods", "an earthquake", "shelling", "a curfew", "the siege", "heavy storms"],
    "victims": ["villagers", "civilians", "refugees", "soldiers", "hostages", "families", "aid workers", "pilgrims"],
    "peace": ["a ceasefire", "a treaty", "sanctions", "elections", "an amnesty", "a new constitution", "peace talks"],
    # Sports
    "athlete": ["the striker", "the goalkeeper", "the captain", "the rookie", "the veteran pitcher", "the champion", "the sprinter", "the coach"],
    "team": ["the visitors", "the home side", "the defending champions", "the national team", "the reds", "the league leaders"],
    "contest": ["the final", "the semifinal", "the derby", "the opening round", "the playoffs", "the tournament", "the qualifier"],
    "feat": ["a hat trick", "a late winner", "a personal best", "a penalty", "a double", "a clean sheet", "a home run"],
    "injury": ["a knee injury", "a broken wrist", "a hamstring strain", "a shoulder problem", "a long suspension"],
    # Business
    "firm": ["the retailer", "the airline", "the carmaker", "the lender", "the insurer", "the oil producer", "the brewer", "the steel maker"],
    "money": ["profit", "revenue", "sales", "earnings", "costs", "debt", "dividends", "exports"],
    "market": ["analysts", "investors", "shareholders", "regulators", "creditors", "traders", "brokers", "economists"],
    "move": ["rose", "fell", "slipped", "climbed", "jumped", "tumbled", "doubled", "shrank"],
    "deal": ["a merger", "a buyout", "a takeover bid", "a bond sale", "a price cut", "a refinancing", "a listing"],
    # Sci/Tech
    "maker": ["the software maker", "the chip designer", "the laboratory", "the search company", "the space agency", "the startup", "the browser project"],
    "scientist": ["researchers", "astronomers", "engineers", "biologists", "physicists", "programmers", "chemists"],
    "gadget": ["a phone", "a browser", "a processor", "a satellite", "a robot", "a probe", "a database", "a console", "an operating system"],
    "flaw": ["a security hole", "a memory leak", "a worm", "a design fault", "a software error", "spyware"],
    "finding": ["water on mars", "a distant galaxy", "a new protein", "a fossil genome", "dark matter", "a faster algorithm", "a tiny planet"],
}  # fmt: skip

_CLAUSES = (
    (  # World
        "{leader} said {unrest} had killed {number} {victims} near the {place}",
        "{state} of {city} agreed to {peace} after {number} days of {unrest}",
        "{leader} , {person} , called for {peace} in {city}",
        "{number} {victims} fled {city} when {unrest} reached the {place}",
        "{victims} crossed the river and camped on the far bank|river near {city}",
        "a court|law in {city} jailed {person} for {number} years",
        "an air strike|attack on the {place} of {city} wounded {number} {victims}",
        "the blast broke the windows|glass of {state} in {city}",
        "{state} will sign a draft|law of {peace} on {day}",
        "{leader} faced a charge|crime of fraud at a trial|law in {city}",
        "{person} was held in a cell|prison by {state} of {city}",
        "a match|flame set the camp of {number} {victims} on fire near {city}",
        "ships left the port|harbour of {city} as {unrest} spread to the {place}",
        "{person} won the race|election for president of {city} on {day}",
        "{state} put its seal|stamp on {peace} with {city}",
    ),
    (  # Sports
        "{athlete} scored {feat} as {team} beat {city} in {contest}",
        "{team} lost {number} games in a row before {contest}",
        "{athlete} , {person} , will miss {contest} with {injury}",
        "{person} set {feat} in {contest} at {city} on {day}",
        "{athlete} signed for {city} on {day} for {number} seasons",
        "{team} won the match|game against {city} with {feat}",
        "{person} walked off the court|tennis after the {ordinal} set in {city}",
        "{person} threw the {ordinal} strike|baseball and {team} took {contest}",
        "{athlete} was the {ordinal} pick of the draft|selection for {city}",
        "{person} missed the goal|posts from {number} metres and {team} went out",
        "rain made the pitch|field in {city} too wet for {contest}",
        "{person} won the race|running by {number} seconds in {city}",
        "{athlete} swung the bat|club and gave {team} {feat}",
        "a drive|stroke from the {ordinal} tee gave {person} {feat}",
        "the young star|player of {city} left {contest} with {injury}",
    ),
    (  # Business
        "{money} of {firm} {move} {number} percent in the {ordinal} quarter",
        "{firm} in {city} offered {deal} worth {number} billion dollars",
        "{market} said {money} at {firm} {move} on {day}",
        "{firm} named {person} its chief executive after {deal}",
        "{market} in {city} rejected {deal} from {firm}",
        "the central bank|money of {city} raised rates as {money} {move}",
        "workers at {firm} in {city} ended a strike|labour over pay",
        "{firm} missed its goal|target as {money} {move} {number} percent",
        "{person} made a pitch|offer to {market} for {deal}",
        "{firm} took a charge|cost of {number} million dollars for {deal}",
        "net|profit income of {firm} {move} on {day} , {market} said",
        "a big apple|fruit harvest cut {money} of growers near {city}",
        "{firm} will match|equal {deal} that {market} got in {city}",
        "the price of a share|stock in {firm} {move} {number} percent",
        "{person} began a drive|campaign to cut {money} at {firm}",
    ),
    (  # Sci/Tech
        "{maker} released {gadget} with {number} times the speed",
        "{scientist} in {city} found {finding} after {number} years",
        "{maker} fixed {flaw} in {gadget} on {day}",
        "{person} of {maker} showed {gadget} in {city}",
        "{scientist} used {gadget} to look for {finding}",
        "{maker} sold {number} million copies of windows|system for {gadget}",
        "a cell|battery that lasts {number} days will power {gadget} from {maker}",
        "{scientist} grew a cell|biology with {finding} in {city}",
        "the program finds a match|pattern for {finding} in {number} seconds",
        "{scientist} saw a star|astronomy near {finding} on {day}",
        "{maker} put a disk drive|storage and a usb port|plug into {gadget}",
        "the battery of {gadget} holds its charge|electric for {number} days",
        "apple|company and {maker} agreed on {gadget}",
        "{scientist} tracked a bat|animal with {gadget} near {city}",
        "{maker} brought {gadget} to the net|web in {city}",
    ),
)  # fmt: skip

# {a} is the main clause, which gives the class, and {b} the subordinate one.
_SINGLE = ("{a} .", "on {day} , {a} .", "{a} , reports say .", "{a} , {person} said .")
_DOUBLE = (
    "{a} , while {b} .",
    "while {b} , {a} .",
    "{a} , a day after {b} .",
    "a day after {b} , {a} .",
    "{a} , just as {b} .",
    "just as {b} , {a} .",
)
# {a} acts and gives the class; {b} is of another class.
_PARTIES = (
    ("{leader}", "{state}"),
    ("{athlete}", "{team}"),
    ("{firm}", "{market}"),
    ("{maker}", "{scientist}"),
)
_ROLES = (
    "{a} {act} {b} over {issue} in {city} .",
    "{b} was {act} by {a} over {issue} in {city} .",
    "{a} , {act} by {b} in {city} , gave in on {day} .",
    "{b} and {person} were {act} by {a} on {day} .",
    "on {day} , {a} and {person} {act} {b} .",
    "{b} , said {person} , was {act} by {a} .",
)
_DOUBLE_FRACTION = 0.1
_ROLE_FRACTION = 0.1


class Text(NamedTuple):
    """A text of one class.

    Attributes:
        label: Class in [0, 4).
        text: Words, separated by spaces.
        senses: Position and sense, such as ``(3, "bank/river")``, of each ambiguous word.
    """

    label: int
    text: str
    senses: tuple[tuple[int, str], ...]


class Sample(NamedTuple):
    """Training and test texts with balanced classes."""

    train: list[Text]
    test: list[Text]


def sample_corpus(seed: int = 0, train: int = 2800, test: int = 700) -> Sample:
    """Generate the corpus; no text occurs in both parts.

    Args:
        seed: Random seed of the grammar.
        train: Number of training texts.
        test: Number of test texts.

    Examples:
        >>> corpus = sample_corpus(train=8, test=4)
        >>> [t.label for t in corpus.test]
        [0, 1, 2, 3]
    """
    rng = random.Random(seed)
    names = sorted({"".join(rng.choices(_SYLLABLES, k=k)) for k in (2, 3) for _ in range(90)})
    rng.shuffle(names)
    lists = _LISTS | {"person": names[::2], "city": names[1::2]}
    seen: set[str] = set()
    texts: list[Text] = []
    while len(texts) < train + test:
        text = _generate_text(len(texts) % len(CLASSES), lists, rng)
        if text.text not in seen:
            seen.add(text.text)
            texts.append(text)
    return Sample(texts[:train], texts[train:])


def _generate_text(label: int, lists: dict[str, list[str]], rng: random.Random) -> Text:
    other = rng.choice([c for c in range(len(CLASSES)) if c != label])
    kind = rng.random()
    if kind < _ROLE_FRACTION:
        frame, a, b = rng.choice(_ROLES), rng.choice(_PARTIES[label]), rng.choice(_PARTIES[other])
    else:
        frame = rng.choice(_DOUBLE if kind < _ROLE_FRACTION + _DOUBLE_FRACTION else _SINGLE)
        a, b = rng.choice(_CLAUSES[label]), rng.choice(_CLAUSES[other])
    frame = frame.replace("{a}", a).replace("{b}", b)
    filled = re.sub(r"\{(\w+)\}", lambda m: rng.choice(lists[m.group(1)]), frame)
    words, senses = [], []
    for word in filled.split():
        word, _, sense = word.partition("|")
        if sense:
            senses.append((len(words), f"{word}/{sense}"))
        words.append(word)
    return Text(label, " ".join(words), tuple(senses))
