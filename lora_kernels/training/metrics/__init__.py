"""Scores of predictions: pure functions, one file per kind of answer. torchmetrics, sacrebleu and
rouge-score count; what is here names, guards and joins."""
