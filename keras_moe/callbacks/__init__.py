"""Callbacks that show what a model's experts do, and how fast it trains."""

from keras_moe.callbacks.expert_examples import ExpertExample, ExpertExamples
from keras_moe.callbacks.expert_load_report import ExpertLoadReport
from keras_moe.callbacks.throughput import Throughput

__all__ = ["ExpertExample", "ExpertExamples", "ExpertLoadReport", "Throughput"]
