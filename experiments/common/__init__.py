"""Shared parts of the commands: flags, start-up, feature sources, plots."""
