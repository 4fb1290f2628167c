"""Centred descriptors: the same function, and no answer to what moves all images together."""

import torch
import torch.nn.functional as F

from bcnn.model import BCNN, Centering
from bcnn.module import BCNNModule
from bcnn.weights import load_model, source_state_dict


def model() -> BCNN:
    torch.manual_seed(0)
    model = BCNN(["a", "b", "c"])
    torch.nn.init.normal_(model.classifier.weight)
    return model


def test_another_centre_leaves_every_logit() -> None:
    network, rows = model(), torch.rand(4, 131_328)
    before = network.logits(rows)
    network.center_on(torch.rand(131_328))
    torch.testing.assert_close(network.logits(rows), before, rtol=1e-4, atol=1e-2)


def test_in_training_a_shift_of_the_whole_batch_changes_nothing() -> None:
    centering = Centering(6, momentum=0.1).train()
    rows = torch.rand(8, 6, dtype=torch.float64, requires_grad=True)
    centering.double()
    torch.testing.assert_close(centering(rows + 100), centering(rows))
    centering(rows).square().sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.sum(0), torch.zeros(6, dtype=torch.float64))


def test_the_running_mean_follows_the_batches_and_is_what_evaluation_uses() -> None:
    centering = Centering(3, momentum=0.1).train()
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    for _ in range(100):
        centering(rows)
    torch.testing.assert_close(centering.mean, torch.full((3,), 2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(centering.eval()(rows[:1]), rows[:1] - centering.mean)


def test_finetune_centres_a_head_that_knew_no_centring_without_changing_it(tmp_path: object) -> None:
    network = model()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        before = network.eval()(images)
    module = BCNNModule(network, "finetune", centering=0.1).train()
    loss = F.cross_entropy(module(images), torch.tensor([0, 1, 2, 0]))
    assert loss.isfinite() and network.centering.mean.any()
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), before, rtol=1e-4, atol=1e-4)


def test_stage_last_leaves_the_centre() -> None:
    module = BCNNModule(model(), "last").train()
    module(torch.rand(4, 131_328))
    assert not module.model.centering.mean.any()


def test_files_keep_the_centre_and_the_source_layout_has_it_in_the_bias(tmp_path: object) -> None:
    network = model()
    network.set_normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    network.center_on(torch.rand(131_328) / 300)
    images = torch.rand(2, 3, 32, 32)
    for name, state in (("own.pth", network.state_dict()), ("source.pth", source_state_dict(network))):
        torch.save(state, f"{tmp_path}/{name}")
        torch.testing.assert_close(
            load_model(f"{tmp_path}/{name}")(images), network(images), rtol=1e-4, atol=1e-4
        )
