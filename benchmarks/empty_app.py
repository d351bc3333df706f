"""An app of Flower that computes nothing: `benchmarks.floor` packs this file, and nothing else, and runs it.

Every round the server sends one block of bytes to each site, and each site answers with one of its own.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()
WAIT = 0.2


def block(size: int, *seed: int) -> RecordDict:
    """Bytes that no other message has, as one array."""
    data = np.random.default_rng(seed).bytes(size)
    array = ArrayRecord({"data": Array("uint8", (size,), "bytes", data)})
    return RecordDict({"data": array, "text": ConfigRecord({"size": size, "round": seed[0]})})


@client.train()
def answer(message: Message, _context: Context) -> Message:
    """As many bytes as came."""
    told = message.content.config_records["text"]
    size, number = told["size"], told["round"]
    assert isinstance(size, int)
    assert isinstance(number, int)
    return Message(block(size, number, message.metadata.dst_node_id % 2**32), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Some rounds; the end of each is noted in a file."""
    size, rounds, sites = (int(str(context.run_config[key])) for key in ("size", "rounds", "sites"))
    while len(nodes := list(grid.get_node_ids())) < sites:
        time.sleep(WAIT)
    for number in range(1, rounds + 1):
        content = block(size, number)
        waiting: set[str] = set()
        for node in nodes:
            waiting |= set(grid.push_messages([Message(content, node, "train")]))
        while waiting:
            waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(list(waiting))}
            time.sleep(WAIT)
        Path(str(context.run_config["index"])).write_text(str(number))
