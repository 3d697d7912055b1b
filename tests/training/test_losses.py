"""The terms of the VAE's objective."""

import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("yaml")
from lpmrf_fast.training.losses import PatchCritic, PerceptualLoss, balanced, hinge_loss, kl_divergence


def test_kl_against_torch():
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(kl_divergence(mean, logvar), exact.mean(), rtol=1e-5)
    assert kl_divergence(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)) == 0


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file in torchvision's layout with random weights: the real ones are not shipped."""
    widths = [64, 64, 128, 128] + [256] * 4 + [512] * 8
    places = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    state, channels = {"classifier.0.weight": torch.zeros(1)}, 3
    for place, width in zip(places, widths):
        state[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        state[f"features.{place}.bias"] = torch.zeros(width)
        channels = width
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(state, path)
    return path


def test_perceptual_loss_sees_differences_and_has_gradients(vgg):
    loss = PerceptualLoss(str(vgg))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert loss(x, x) == 0
    near, far = (x + s * torch.randn_like(x) for s in (0.01, 0.3))
    assert 0 < loss(near, x) < loss(far, x)
    far.requires_grad_()
    loss(far, x).backward()
    assert far.grad.abs().sum() > 0 and all(p.grad is None for p in loss.parameters())


def test_other_weights_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="features|Missing"):
        PerceptualLoss(str(tmp_path / "other.pth"))


def test_balanced_gives_the_terms_gradients_the_asked_ratio():
    w = torch.nn.Parameter(torch.randn(5))
    anchor, term = (w - 1).abs().sum(), 100 * w.square().sum()
    (g,) = torch.autograd.grad(balanced(term, anchor, w, 0.25), w)
    assert g.norm() == pytest.approx(0.25 * 5**0.5, rel=1e-4)


def test_critic_learns_to_tell_noise_from_flat_patches():
    torch.manual_seed(0)
    critic = PatchCritic(8)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    flat, noise = torch.zeros(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    first = hinge_loss(critic(flat), critic(noise)).item()
    for _ in range(60):
        loss = hinge_loss(critic(flat), critic(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first and critic(flat).mean() > critic(noise).mean()
