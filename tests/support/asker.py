"""Ask the daemon on the socket that is named whatever comes as a line of JSON on stdin, and print its reply as one."""

from __future__ import annotations

import json
import sys

from agent import client, wire

TIMEOUT_S = 30.0


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = client.request(sys.argv[1], message, timeout_s=TIMEOUT_S + message.get("wait_s", 0))
        except wire.WireError as error:
            reply = wire.refusal(error)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
