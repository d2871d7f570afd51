"""The tiny model that all experiments begin with.

``demonstrators``  carry out the tasks, and are confused about them
``build``          makes ``weights/`` from nothing, in a few minutes: ``make example-model``
"""
