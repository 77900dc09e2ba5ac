"""The named runs of train.py: what each changes against the defaults of train.Config."""

# The paper's optimisation, section 4.1: plain SGD at one rate for all stages, on class folders.
PAPER = dict(dataset="folder", optimizer="sgd", lr=3e-5, mil_lr=1.0, steps=20_000, workers=4, save_every=1000)

PRESETS = {
    # What a bare `python train.py` runs, on the built-in shapes: a few minutes on a CPU.
    "quick": dict(
        augment=False,  # shapes vary by themselves
        backbone="random_vit8",
        size=128,
        ffn_ratio=2.0,
        mil_ffn=True,  # random features: without it these two stages learn little
        volume_window=2,
        candidates=16,
        temperature=0.1,
        steps=200,
        batch=6,
        lr=2e-3,
        out="runs/quick",
        val_every=100,
    ),
    # The run of the tables of photographs: half an hour on one CPU core.
    "photos": dict(
        dataset="folder",
        backbone="dinov2_vits14",
        layer="9,10",
        axes=256,
        size=224,
        volume_window=2,
        saliency_threshold=0.2,
        loop_radius=1.5,
        hough=False,  # its votes and the consensus say the same: what it selects teaches nothing new
        consensus=3,
        facing=True,
        frozen_share=0.5,
        steps=240,
        batch=6,
        lr=2e-4,
        mil_lr=0.01,
        val="shapes",  # drawn pictures are enough to see that the run is sound
        val_every=0,
        out="runs/photos",
    ),
    # Section 4.1 on ImageNet's folders, on our form of the modules.
    "paper": PAPER | dict(out="runs/paper"),
    # Eq. (1) and section 4.1 to the letter; docs/departures.md names what of section 3 stays ours.
    "literal": PAPER | dict(
        residual=False,
        ffn_ratio=0.0,
        augment=False,
        temperature=1.0,
        ap="max",
        consensus=0,
        loop_radius=0.0,
        frozen_share=0.0,
        saliency_rescale=False,
        out="runs/literal",
    ),
}
