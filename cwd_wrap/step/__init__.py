"""One step of a wrapped optimizer: what it does with which parameter, and the four ways to do it."""
