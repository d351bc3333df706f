"""From a config to a run: the only package that knows all others.

Here are what a config describes (`settings`, `experiment`), one run (`run`), and a module for each command. The rooms:

    folders    a run's folder: opened again, gone on with, its models, what is kept beside its scores
    protocols  several runs that belong together: one site left out in turn, one stage after the other
    scores     scores and pictures of models
    sites      sites that are not in this process
    exports    what `export.py` writes
    generative data that are made, or made anew, before a segmenter is trained
    tuning     the search behind `sweep.py tune`
"""

from fedseg import one_copy

one_copy(__name__)
