"""Races of optimizers: turns, checkpoints, histories, tables and pictures."""
