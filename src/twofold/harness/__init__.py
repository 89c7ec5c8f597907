"""lm-evaluation-harness on the models of a study: its own tasks, and ours written as tasks of it.

``questions`` writes held-out questions as local tasks, ``tokenizer`` reads bytes, ``scoring`` runs a model through the harness, and ``comparison``
says what the scores of a study's variants tell. None of them needs the network; the harness's own tasks do, the first time.
"""
