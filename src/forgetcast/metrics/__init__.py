"""Pure functions of the accuracy matrix. Every number carries its definition's name."""
