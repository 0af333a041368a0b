"""A page in headless Chromium, for tests: how far it overflows, which pictures fail, whether it runs or asks for anything.

`needs_chromium` skips with the reason where there is no browser on the PATH.
"""

from __future__ import annotations

import html
import re
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH, found none")
OWN_HOSTS = (".google.com", ".googleapis.com")  # what the browser itself asks for, whatever it shows


def browse(page: str, folder: Path, width: int) -> tuple[str, list[str]]:
    """Show a page in a frame of that width: "pixels of overflow, pictures that failed, scripts, what sticks out", hosts asked.

    All requests go to a proxy of ours that notes and refuses them, so none leaves this machine.
    """
    server, asked = socket.create_server(("127.0.0.1", 0)), []

    def refuse(caller: socket.socket) -> None:
        with caller, suppress(OSError):
            if line := caller.recv(4096).split(b"\r\n")[0].decode("latin-1"):
                asked.append(line)
                caller.sendall(b"HTTP/1.1 404 Not here\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def listen() -> None:
        with suppress(OSError):  # until the server is closed
            while True:
                # A thread each: the browser also opens connections on which it then says nothing.
                threading.Thread(target=refuse, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    script = """onload = () => {
        const page = document.getElementById("f").contentDocument, all = [...page.querySelectorAll("body *")];
        const root = page.documentElement, end = root.clientWidth + 0.5;
        const out = all.filter(e => !e.parentElement.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > end);
        const failed = [...page.images].filter(i => !i.naturalWidth);
        document.title = [root.scrollWidth - root.clientWidth, failed.length, page.scripts.length, out.map(e => e.tagName)].join(" ");
    }"""
    outer = folder / "outer.html"
    outer.write_text(
        f'<meta charset="utf-8"><iframe id="f" style="width:{width}px;height:2000px;border:0" srcdoc="{html.escape(page)}">'
        f"</iframe><script>{script}</script>"
    )
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
    command = [str(CHROMIUM), *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={folder / 'profile'}"]
    command += [f"--proxy-server=127.0.0.1:{server.getsockname()[1]}", "--proxy-bypass-list=<-loopback>"]
    command += ["--virtual-time-budget=5000", "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    server.close()
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    hosts = [line.split()[1].removeprefix("http://").partition("/")[0].partition(":")[0] for line in asked]
    return html.unescape(title[1]).strip(), [host for host in hosts if not host.endswith(OWN_HOSTS)]
