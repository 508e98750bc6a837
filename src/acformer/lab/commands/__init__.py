"""The laboratory's commands, one a file, as in `acformer.commands`."""

from acformer.lab.commands import bench, demo, quickstart, reproduce, stats, visualize

COMMANDS = (quickstart, visualize, stats, demo, bench, reproduce)
