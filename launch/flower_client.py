"""Flower's ClientApp: hands every message to the site's worker.

Flower starts a process for each message, so this module imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedseg.console import own_files
from fedseg.federation.flower.envelope import Envelope
from fedseg.federation.flower.worker import ask, code_of

HERE = Path(__file__).resolve().parent.parent
app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
def answer(message: Message, context: Context) -> Message:
    """Whatever is asked: the question itself says what."""
    node = {key: str(value) for key, value in context.node_config.items()}
    if not node.get("state"):
        raise ValueError("node-config: 'state' is needed, the folder for all that the site keeps")
    state = Path(node["state"]).expanduser()
    arguments = [f"{key}={value}" for key, value in sorted(node.items())]
    command = [sys.executable, "-m", "fedseg.launch.sites.site_worker", str(os.getppid()), *arguments]
    with own_files():
        found = ask(state, command, code_of(str(HERE), *arguments), Envelope.from_records(message.content), cwd=HERE)
    return Message(found.to_records(), reply_to=message)
