"""Evaluation: image writers, scores and the demo."""
