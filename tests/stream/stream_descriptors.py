"""A server of its own, with few descriptors: prints its port, and serves until its input ends."""

import asyncio
import resource
import sys
import tempfile

from inferix.stream import log
from inferix.stream.server import Server
from inferix.stream.testing import open_bars


async def serve():
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(open_bars, port=0, folder=folder)
        await server.start()
        await server.session.tried.wait()
        print(server.port, flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        await server.close()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
    log.configure()
    asyncio.run(serve())
