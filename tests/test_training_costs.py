"""What a training step must not do, held by counts: graphs, gradients, optimizer state and logits that nobody needs."""

import pytest
import tiny
import torch
from transformers import TrainingArguments

from acformer.data.collate import Collator, ConversationDataset
from acformer.data.samples import Sample
from acformer.training.trainer import AcFormerTrainer, freeze, module_parameters

pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable:FutureWarning"  # renamed after 5.19
)
STAGE_ONE = {"connector": 0.01}


@pytest.fixture
def pixels():
    return torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


@pytest.fixture
def batch():
    inputs = tiny.inputs(["<image> red green blue red", "yes <image> hello blue"], tiny.pictures([0, 1]))
    labels = inputs["input_ids"].clone()
    labels[:, :9] = -100
    labels[inputs["attention_mask"] == 0] = -100
    return {**inputs, "labels": labels}


def stage_one(**changes) -> tuple:
    """A model in training with its connector alone learning, and its trainer."""
    model = tiny.model(**changes).train()
    freeze(model, STAGE_ONE)
    args = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, optim="adamw_torch_fused")
    return model, AcFormerTrainer(model=model, args=args, learning_rates=STAGE_ONE)


def saved_by(run) -> int:
    """How many tensors autograd keeps of what `run` does."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1) or tensor, lambda tensor: tensor):
        run()
    return len(kept)


def leaves(loss: torch.Tensor) -> set[int]:
    """The tensors whose gradient the loss's graph leads to."""
    found, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.add(id(node.variable))
        ahead += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("vision", tiny.ENCODERS)
@pytest.mark.parametrize("how", ["plain", "checkpointing", "inputs require gradients"])
def test_no_graph_is_kept_of_a_frozen_encoder(vision, how, pixels):
    model, _ = stage_one(vision=vision)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    elif how == "inputs require gradients":
        model.enable_input_require_grads()
    found = []
    assert saved_by(lambda: found.append(model.get_vision_features(pixels))) == 0
    assert not any(array.requires_grad for array in found[0].arrays.values())


def test_a_graph_is_kept_of_an_encoder_that_learns_or_whose_pixels_do(pixels):
    model = tiny.model()
    assert saved_by(lambda: model.get_vision_features(pixels)) > 0
    freeze(model, STAGE_ONE)
    assert saved_by(lambda: model.get_vision_features(pixels.requires_grad_())) > 0


def test_stage_one_makes_no_gradient_and_no_state_but_the_connectors(batch):
    model, trainer = stage_one()
    optimizer = trainer.create_optimizer()
    loss = trainer.compute_loss(model, batch)
    connector = {id(weight) for weight in module_parameters(model)["connector"]}
    assert leaves(loss) == connector
    loss.backward()
    optimizer.step()
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == connector
    assert {id(weight) for weight in optimizer.state} == connector
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize("rates", [STAGE_ONE, {"connector": 0.01, "language_model": 0.01}])
def test_logits_of_other_positions_are_never_made(batch, rates, record_ops):
    model, trainer = stage_one()
    freeze(model, rates)
    text, supervised = model.config.text_config, int((batch["labels"][:, 1:] != -100).sum())
    with record_ops() as record:
        trainer.compute_loss(model, batch).backward()
    wide = [shape for shape in record.shapes if text.vocab_size in shape and text.hidden_size not in shape]
    assert max(torch.Size(shape).numel() for shape in wide) == supervised * text.vocab_size
    assert supervised < batch["labels"].numel() // 2


def test_the_encoder_runs_once_for_questions_about_one_picture(tmp_path):
    tiny.picture(0).save(tmp_path / "0.png")
    path, calls = tmp_path / "0.png", []
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    said = ({"role": "user", "content": parts}, {"role": "assistant", "content": "red"})
    processor, (model, trainer) = tiny.processor(), stage_one()
    dataset = ConversationDataset([Sample(str(n), said, (path,)) for n in range(3)], processor, group=3)

    def features(path):
        pixels = processor.image_processor([tiny.picture(0)], return_tensors="pt")["pixel_values"]
        return {name: array[0] for name, array in model.get_vision_features(pixels).arrays.items()}

    model.model.connector.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    trainer.compute_loss(model, Collator(processor, features=features)([dataset[0]]))
    assert calls == [1]


def test_no_keys_and_values_are_kept(batch):
    model, trainer = stage_one()
    _, output = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert output.past_key_values is None
    assert model(**batch).past_key_values is not None  # it is a choice of the training step
