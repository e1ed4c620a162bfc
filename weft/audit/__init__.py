"""Attacks on what Weft promises of privacy, each with a number that a broken promise cannot reach."""
