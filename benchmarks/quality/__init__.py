"""How much of full fine-tuning's gain each method gets, on the same backbone, rows, steps and number of trials.

`python -m benchmarks.quality.run` fills a file of cells, one trained prompt or model each; it may be stopped at any
moment and goes on where it stood. `python -m benchmarks.quality.report` writes the page from the cells that are there.
"""
