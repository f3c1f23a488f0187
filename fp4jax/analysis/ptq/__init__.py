"""What quantization does to a pretrained model: loss and weight gradients under every recipe, against high precision.

measure     one recipe on batches of tokens → numbers (measure.py)
render      the table of several recipes (table.py)
draw        their bar chart (figures.py)
"""
