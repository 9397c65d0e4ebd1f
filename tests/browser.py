"""Chromium without a window, through the pipe of its DevTools protocol."""
import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Browser:
    """A tab of a browser.

    Args:
        commands: Descriptor that the browser reads from.
        answers: Descriptor that it writes to.
    """

    def __init__(self, commands: int, answers: int):
        self.commands, self.answers = os.fdopen(commands, 'wb'), os.fdopen(answers, 'rb')
        self.number, self.session, self.unread = 0, None, b''
        self.complaints: list[str] = []  # what stands on the console, and what could not be loaded
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.send(f'{domain}.enable')

    def open(self, page: Path | str, width: int, height: int = 900) -> None:
        """Open a file or an address at a width in CSS pixels, as a phone does below 600 of them."""
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send('Page.navigate', url=page.resolve().as_uri() if isinstance(page, Path) else page)
        while self._read().get('method') != 'Page.loadEventFired':
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.send('Runtime.evaluate', expression=expression, returnByValue=True)
        assert 'exceptionDetails' not in result, result
        return result['result'].get('value')

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.send('Page.getLayoutMetrics')['cssContentSize']
        clip = {'x': 0, 'y': 0, 'width': size['width'], 'height': size['height'], 'scale': 1}
        made = self.send('Page.captureScreenshot', clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made['data']))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self.number += 1
        number = self.number
        message = {'id': number, 'method': method, 'params': params}
        if self.session is not None:
            message['sessionId'] = self.session
        self.commands.write(json.dumps(message).encode() + b'\0')
        self.commands.flush()
        while (answer := self._read()).get('id') != number:
            pass
        assert 'error' not in answer, answer
        return answer['result']

    def _read(self) -> dict[str, Any]:
        while b'\0' not in self.unread:
            part = os.read(self.answers.fileno(), 1 << 16)
            assert part, 'the browser has ended'
            self.unread += part
        line, _, self.unread = self.unread.partition(b'\0')
        message = json.loads(line)
        if message.get('method') in (
                'Log.entryAdded', 'Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Network.loadingFailed',
                'Page.javascriptDialogOpening'):
            self.complaints.append(json.dumps(message['params']))
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium with a profile of its own."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser expects the pipe at descriptors 3 and 4.
        command = f'exec {CHROMIUM} "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ['bash', '-c', command, 'chromium', '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run',
             '--disable-dev-shm-usage', '--remote-debugging-pipe', f'--user-data-dir={profile}'],
            pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
