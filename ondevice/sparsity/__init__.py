"""Skipping work: a method's selector turns hidden states into selections, which the op table computes with."""
