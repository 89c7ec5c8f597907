"""One trainer for every task, and the values that describe a run."""
