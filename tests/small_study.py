"""A study of four runs that take a second each, for tests of what reads and runs study files."""

STUDY = """
name = "mini"
title = "A study of a minute's tenth"
question = "Does it run?"
reference = "free"
seeds = [0, 1]
[model]
tie = "(Q, K, V)"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 8
intermediate_size = 32
[training]
steps = 6
batch_size = 8
learning_rate = 1e-3
[[variants]]
name = "free"
[[variants]]
name = "tied"
model = { tie = "(Q, K=V)" }
[[tasks]]
name = "reverse"
task = "reverse"
options = { length = 5, train_size = 32, held_out_size = 16 }
"""
