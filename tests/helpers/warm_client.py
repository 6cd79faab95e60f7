"""Stands for `python` where a test starts it: another process runs the words, and this one ends as that one.

It runs without the `site` module, in a hundredth of a second. See `warm_python` in `processes.py`.
"""

import json
import os
import signal
import socket
import sys

HANDED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def number_from(server: socket.socket) -> int:
    content = server.recv(4)
    assert len(content) == 4, "the server has ended"
    return int.from_bytes(content, "little", signed=True)


def main() -> None:
    address, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        asked = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(server, [len(asked).to_bytes(4, "little")], [1, 2])
        server.sendall(asked)
        pid = number_from(server)
        for number in HANDED_ON:
            signal.signal(number, lambda received, _: os.kill(pid, received))
        status = number_from(server)
    if status < 0:
        if -status in HANDED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


main()
