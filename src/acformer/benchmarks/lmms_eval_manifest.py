"""What lmms-eval finds by the entry point `lmms_eval.models`: where our model's class is.

A file of its own, since lmms-eval reads it while it is itself being imported, and an error here would take all other
plug-ins along.
"""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest("acformer", chat_class_path="acformer.benchmarks.lmms_eval.AcFormer")
