"""A real S3 server on this machine, moto's, behind a proxy that injects faults."""
import http.client
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from timm_multilabel import stores

BUCKET = 'photos'


class Store:
    """The server as tests use it.

    `faults`: what happens to the next requests whose path holds a text: a status (500), 'cut' (the connection ends in
    the middle of the body) or 'slow' (the answer comes after the client has given up). `asked`: the requests so far.
    """

    def __init__(self, endpoint: str, moto_port: int):
        self.endpoint, self.moto_port = endpoint, moto_port
        self.faults: dict[str, list[int | str]] = {}
        self.asked: list[str] = []
        self.client = boto3.client('s3', endpoint_url=f'http://127.0.0.1:{moto_port}', region_name='us-east-1')
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, folder: Path, key: str) -> str:
        """Upload a folder; its address."""
        for path in folder.rglob('*'):
            if path.is_file():
                self.client.upload_file(str(path), BUCKET, f'{key}/{path.relative_to(folder)}')
        return f's3://{BUCKET}/{key}'

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f'{prefix}/').get('Contents', [])
        return sorted(each['Key'].removeprefix(f'{prefix}/') for each in found)

    def fault(self, path: str) -> int | str | None:
        for text, left in self.faults.items():
            if text in path and left:
                return left.pop(0)
        return None


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    store: Store

    def log_message(self, *args: object) -> None:
        pass

    def _forward(self) -> None:
        self.store.asked.append(f'{self.command} {self.path}')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        fault = self.store.fault(self.path)
        if isinstance(fault, int):
            code = {403: 'AccessDenied', 404: 'NoSuchKey', 500: 'InternalError'}[fault]
            text = f'<Error><Code>{code}</Code><Message>{code}, says the test</Message></Error>'
            self._answer(fault, {}, b'' if self.command == 'HEAD' else text.encode())
            return
        if fault == 'slow':
            time.sleep(4)
        server = http.client.HTTPConnection('127.0.0.1', self.store.moto_port)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        content = answer.read()
        server.close()
        self._answer(answer.status, dict(answer.getheaders()), content, cut=fault == 'cut')

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ('connection', 'transfer-encoding', 'content-length'):
                self.send_header(name, value)
        length = headers.get('Content-Length', len(content)) if self.command == 'HEAD' else len(content)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        try:
            self.wfile.write(content[:len(content) // 2] if cut else content)
        except OSError:  # the client has given up
            cut = True
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward


@contextmanager
def object_store() -> Iterator[Store]:
    """The server, with the environment in which s3:// leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
            patch.setenv(name, 'testing')
        patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
        patch.setenv('AWS_MAX_ATTEMPTS', '1')  # so that all tries are ours
        logging.getLogger('werkzeug').setLevel(logging.ERROR)
        moto = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
        moto.start()
        proxy = ThreadingHTTPServer(('127.0.0.1', 0), _Proxy)
        proxy.daemon_threads = True
        proxy.handle_error = lambda *args: None  # of clients that have given up
        store = Store(f'http://127.0.0.1:{proxy.server_port}', moto.get_host_and_port()[1])
        _Proxy.store = store
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        patch.setenv('AWS_ENDPOINT_URL', store.endpoint)
        # The way in which a user of fsspec has it: a slow server is given up after two seconds.
        patch.setitem(fsspec.config.conf, 's3', {'config_kwargs': {'read_timeout': 2}})
        patch.setattr(stores, 'WAITS', [0.05, 0.05, 0.05, 0.05])
        stores._system.cache_clear()  # clients of an earlier module
        try:
            yield store
        finally:
            stores._system.cache_clear()
            proxy.shutdown()
            moto.stop()
