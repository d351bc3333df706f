"""Settings of runs that are over in seconds; a test adds what it is about."""

TINY = (
    "data.cases_per_site=8",
    "data.amount=0",
    "data.size=32",
    "data.resolution=32",
    "data.batch_size=2",
    "model=tiny",
    "model.encoder_depth=2",
    "model.decoder_channels=[16, 8]",
    "federation.local_steps=1",
    "trainer.threads=1",
    "trainer.accelerator=cpu",
    "evaluation.overlays=false",
)
