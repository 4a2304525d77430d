"""The mini bench: original questions and a tiny trained model with a tuned delta, both made by `make.py`."""
