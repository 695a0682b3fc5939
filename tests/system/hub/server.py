"""A Hub on loopback: as much of its HTTP API as huggingface_hub uses for models, over real sockets.

Users with tokens, private repositories, branches, commits, LFS objects named by their SHA-256 and checked, and a second
port that stores large files as the Hub's own storage does: behind signed addresses, and no token may be sent there.
Strict: what it does not know is answered with 404 and noted in `Hub.surprises`. Faults can be put in the way.
"""

import base64
import hashlib
import json
import re
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".onnx", ".bin")
DATE = "2026-01-01T00:00:00.000Z"


class Refused(Exception):  # noqa: N818 - it is an answer, not a failure of the server
    """An answer other than success; ``code`` goes where huggingface_hub looks for it."""

    def __init__(self, status, message, code=None, headers=()):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers)


@dataclass
class Fault:
    """What goes wrong with requests of this method and path: an answer, or silence after so many bytes of the body."""

    method: str
    path: str
    status: int | None = None
    message: str = ""
    after: int | None = None
    drop: bool = False
    times: int = 1
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    """Commits by name, each with its files by path; branches by name."""

    name: str
    private: bool
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)

    def commit(self, branch, summary, files):
        parent = self.branches.get(branch)
        record = json.dumps([self.name, branch, parent, summary, files, len(self.commits)])
        oid = hashlib.sha1(record.encode()).hexdigest()
        self.commits[oid] = {"parent": parent, "summary": summary, "files": files}
        self.branches[branch] = oid
        return oid

    def resolve(self, revision):
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]["files"]


class Hub:
    """The state behind both ports. ``log`` has (method, path, status, bytes of the request's body)."""

    def __init__(self, root, tokens, part_bytes=1 << 20):
        self.root, self.tokens, self.part_bytes = Path(root), tokens, part_bytes
        self.repositories, self.parts, self.log, self.surprises, self.faults = {}, {}, [], [], []
        self.xet = None  # the folder of Xet's own storage, where it is on
        self.lock = threading.RLock()
        (self.root / "objects").mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (_Api, _Storage)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for fault in self.faults:
            fault.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def stored(self, oid):
        return self.root / "objects" / oid

    def keep(self, content):
        """Store a small file under its git name."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.stored(oid).write_bytes(content)
        return {"oid": oid, "size": len(content), "lfs": False}

    def create(self, name, private):
        with self.lock:
            found = self.repositories[name] = Repository(name, private)
            patterns = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            found.commit("main", "initial commit", {".gitattributes": self.keep(patterns.encode())})
        return found

    def xet_names(self):
        """Xet's name of each file that its client stored, by SHA-256, out of the shards that it wrote."""
        shards = [] if self.xet is None else self.xet.rglob("shards/*.mdb")
        return {sha256: name for shard in shards for sha256, name in _files_of_shard(shard.read_bytes())}

    def requests(self, method, path=""):
        """How many requests of this method had a path that matches."""
        return sum(one[0] == method and re.search(path, one[1]) is not None for one in self.log)

    def uploads(self):
        """How often each object was sent in full, by its SHA-256."""
        return Counter(path.split("/")[2] for method, path, status, _ in self.log if method == "PUT" and status == 200)

    def content(self, name, path, revision="main"):
        return self.stored(self.repositories[name].files(revision)[path]["oid"]).read_bytes()


class _Handler(BaseHTTPRequestHandler):
    """What both ports share: finding the route, reading the body, answering."""

    protocol_version = "HTTP/1.1"
    routes = ()

    def log_message(self, *_):
        """Nothing on standard error; `Hub.log` has it."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def serve(self):
        self.hub, self.taken = self.server.hub, 0
        address = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        try:
            self.meet(address.path)
            status = self.answer(self.find(address.path))
        except Refused as refused:
            status = self.refuse(refused)
        self.hub.log.append((self.command, address.path, status, self.taken))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def meet(self, path):
        """Run into a fault, if one lies here."""
        with self.hub.lock:
            found = next((one for one in self.hub.faults if one.times and self.fits(one, path)), None)
            if found is None:
                return
            found.times -= 1
        if found.after is not None:
            self.take(found.after)
            found.reached.set()
            if not found.drop:
                found.release.wait(60)
            self.close_connection = True
            self.connection.close()
            raise ConnectionAbortedError
        self.body()
        raise Refused(found.status, found.message)

    def fits(self, fault, path):
        return fault.method == self.command and re.search(fault.path, path)

    def find(self, path):
        for method, pattern, action in self.routes:
            if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                match := re.fullmatch(pattern, path)
            ):
                return action(self, *map(unquote, match.groups()))
        self.hub.surprises.append(f"{self.command} {path}")
        self.body()
        raise Refused(404, f"no endpoint {self.command} {path}")

    def take(self, count):
        content = self.rfile.read(count)
        self.taken += len(content)
        return content

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.take(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length", 0))
        content = self.take(length)
        if len(content) != length:
            raise ConnectionAbortedError
        return content

    def answer(self, found):
        status, content, headers = found
        if isinstance(content, dict | list):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return status

    def refuse(self, refused):
        code = {"X-Error-Code": refused.code} if refused.code else {}
        headers = {"X-Error-Message": refused.message, **code, **refused.headers}
        return self.answer((refused.status, {"error": refused.message}, headers))


class _Api(_Handler):
    """The Hub's own port."""

    def user(self):
        """Name and role of who asks; nobody without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, (None, "read"))

    def repository(self, name, *, write=False):
        user, role = self.user()
        found, owner = self.hub.repositories.get(name), name.partition("/")[0]
        if found is None or (found.private and user != owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user != owner or role != "write"):
            raise Refused(403 if user else 401, f"You have no write access to {name}")
        return found

    def whoami(self):
        user, role = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return 200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}}, {}

    def create(self):
        asked, (user, role) = json.loads(self.body()), self.user()
        owner = asked.get("organization") or user
        name, private = f"{owner}/{asked['name']}", asked.get("visibility") == "private" or bool(asked.get("private"))
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if owner != user or role != "write":
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        address = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": address}, {}
        self.hub.create(name, private)
        return 200, {"url": address, "name": name, "id": name}, {}

    def info(self, name, revision="main"):
        found = self.repository(name)
        oid = found.resolve(revision)
        files = [{"rfilename": path} for path in sorted(found.files(oid))]
        about = {"id": name, "modelId": name, "sha": oid, "private": found.private, "siblings": files, "tags": []}
        about |= {"author": name.partition("/")[0], "createdAt": DATE, "lastModified": DATE, "gated": False}
        return 200, {**about, "disabled": False, "downloads": 0, "likes": 0}, {}

    def refs(self, name):
        branches = self.repository(name).branches
        listed = [{"name": one, "ref": f"refs/heads/{one}", "targetCommit": oid} for one, oid in branches.items()]
        return 200, {"branches": listed, "converts": [], "tags": []}, {}

    def tree(self, name, revision, folder=""):
        found = self.repository(name)
        files, inside = found.files(revision), f"{folder}/" if folder else ""
        listed = [_entry(path, file) for path, file in sorted(files.items()) if path.startswith(inside)]
        if folder and not listed:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return 200, listed, {}

    def branch(self, name, branch):
        asked, found = json.loads(self.body() or b"{}"), self.repository(name, write=True)
        if branch in found.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        found.branches[branch] = found.resolve(asked.get("startingPoint", "main"))
        return 200, {}, {}

    def card(self):
        """Like the Hub: a header that is no YAML, or has values of the wrong kind, is refused."""
        content = json.loads(self.body())["content"]
        try:
            found = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
            errors = _card_errors(found)
        except yaml.YAMLError as error:
            errors = [str(error)]
        listed = [{"message": text} for text in errors]
        return 400 if errors else 200, {"errors": listed, "warnings": []}, {}

    def preupload(self, name, revision):
        asked, found = json.loads(self.body())["files"], self.repository(name, write=True)
        files = found.files(revision)
        modes = [{"path": one["path"], "uploadMode": _mode(one), "shouldIgnore": False} for one in asked]
        there = [{"oid": files[one["path"]]["oid"]} if one["path"] in files else {} for one in asked]
        return 200, {"files": [mode | oid for mode, oid in zip(modes, there, strict=True)]}, {}

    def batch(self, name):
        asked = json.loads(self.body())
        self.repository(name, write=True)
        objects = [self.upload_of(name, one["oid"], one["size"]) for one in asked["objects"]]
        multipart = any("chunk_size" in one.get("actions", {}).get("upload", {}).get("header", {}) for one in objects)
        return 200, {"transfer": "multipart" if multipart else "basic", "objects": objects}, {}

    def upload_of(self, name, oid, size):
        """Where an object is to be sent, in one piece or in several; nothing to do where it is here."""
        found = {"oid": oid, "size": size}
        if self.hub.stored(oid).exists():
            return found
        verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"}
        upload = {"href": f"{self.hub.storage}/put/{oid}/0?signature=1"}
        if size > self.hub.part_bytes:
            count = -(-size // self.hub.part_bytes)
            parts = {str(n): f"{self.hub.storage}/put/{oid}/{n}?signature=1" for n in range(1, count + 1)}
            upload = {"href": f"{self.hub.endpoint}/complete/{oid}/{count}"}
            upload["header"] = {"chunk_size": str(self.hub.part_bytes), **parts}
        return {**found, "actions": {"upload": upload, "verify": verify}}

    def complete(self, oid, count):
        asked = json.loads(self.body())
        wanted = [{"partNumber": n, "etag": f'"{oid}-{n}"'} for n in range(1, int(count) + 1)]
        if asked != {"oid": oid, "parts": wanted}:
            raise Refused(400, "the parts are not those that were sent")
        _settle(self.hub, oid, b"".join(self.hub.parts.pop((oid, n)) for n in range(1, int(count) + 1)))
        return 200, {}, {}

    def verify(self, name):
        asked = json.loads(self.body())
        self.repository(name, write=True)
        path = self.hub.stored(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise Refused(404, "the object was not stored")
        return 200, {}, {}

    def commit(self, name, branch):
        lines = [json.loads(line) for line in self.body().splitlines()]
        found = self.repository(name, write=True)
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if branch not in found.branches:
                raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if header.get("parentCommit", found.branches[branch]) != found.branches[branch]:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.files(branch))
            for line in lines:
                self.apply(line["key"], line["value"], files)
            oid = found.commit(branch, header["summary"], files)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}, {}

    def apply(self, key, value, files):
        """One line of a commit, on the files by path."""
        if key == "file":
            files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.hub.stored(value["oid"]).exists() and value["oid"] not in self.hub.xet_names():
                raise Refused(400, f"{value['path']}: its content was never sent")
            files[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key != "header":
            raise Refused(400, f"unknown operation {key}")

    def resolve(self, name, revision, path):
        found = self.repository(name)
        oid = found.resolve(revision)
        commit = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        file = found.files(oid).get(path)
        if file is None:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound", commit)
        if file["lfs"]:
            linked = {"X-Linked-Etag": f'"{file["oid"]}"', "X-Linked-Size": file["size"]}
            if xet_name := self.hub.xet_names().get(file["oid"]):
                route = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{oid}"
                linked |= {"X-Xet-Hash": xet_name, "Link": f'<{route}>; rel="xet-auth"'}
            return 302, b"", {**commit, **linked, "Location": f"{self.hub.storage}/get/{file['oid']}?signature=1"}
        return _ranged(self, self.hub.stored(file["oid"]), {**commit, "ETag": f'"{file["oid"]}"'})

    def xet(self, name, _revision):
        """Where Xet's own storage is: here a folder, which its client opens by itself."""
        self.repository(name)
        if self.hub.xet is None:
            raise Refused(404, "no Xet storage here")
        found = {"casUrl": f"local://{self.hub.xet}", "accessToken": "xet", "exp": 4102444800}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        return 200, found, {header: found[key] for key, header in names.items()}

    _NAME = r"([\w.-]+/[\w.-]+)"
    routes = (
        ("GET", "/api/whoami-v2", whoami),
        ("GET", "/api/agent-harnesses", lambda _: (200, {"standardEnvVars": [], "harnesses": {}}, {})),
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", card),
        ("GET", f"/api/models/{_NAME}", info),
        ("GET", f"/api/models/{_NAME}/revision/([^/]+)", info),
        ("GET", f"/api/models/{_NAME}/refs", refs),
        ("GET", f"/api/models/{_NAME}/tree/([^/]+)", tree),
        ("GET", f"/api/models/{_NAME}/tree/([^/]+)/(.+)", tree),
        ("POST", f"/api/models/{_NAME}/branch/([^/]+)", branch),
        ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", preupload),
        ("POST", f"/api/models/{_NAME}/commit/([^/]+)", commit),
        ("GET", f"/api/models/{_NAME}/xet-(?:read|write)-token/([^/]+)", xet),
        ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", batch),
        ("POST", f"/{_NAME}\\.git/info/lfs/verify", verify),
        ("POST", r"/complete/(\w{64})/(\d+)", complete),
        ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", resolve),
    )


class _Storage(_Handler):
    """Where large files lie. Signed addresses: a token that turns up here has leaked."""

    def signed(self):
        if "signature" not in self.query or "Authorization" in self.headers:
            self.body()
            raise Refused(400, "expected a signature and no token")

    def put(self, oid, number):
        self.signed()
        if number == "0":
            _settle(self.hub, oid, self.body())
        else:
            self.hub.parts[oid, int(number)] = self.body()
        return 200, b"", {"ETag": f'"{oid}-{number}"'}

    def get(self, oid):
        self.signed()
        return _ranged(self, self.hub.stored(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    routes = (("PUT", r"/put/(\w{64})/(\d+)", put), ("GET", r"/get/(\w{64})", get))


def _settle(hub, oid, content):
    """Keep an object, if it is what its name says; a reader never sees a part of it."""
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, f"{oid}: is not the SHA-256 of what was sent")
    temporary = hub.stored(f"{oid}.{threading.get_ident()}")
    temporary.write_bytes(content)
    temporary.rename(hub.stored(oid))


def _files_of_shard(data):
    """(SHA-256, Xet hash) of the files that a shard describes; all entries have 48 bytes."""
    at = 48
    while (name := data[at : at + 32]) != b"\xff" * 32:
        flags, terms = struct.unpack("<II", data[at + 32 : at + 40])
        at += 48 * (1 + terms * (1 + (flags >> 31)))  # the highest bit: each term has a proof
        if flags >> 30 & 1:  # the next one: the SHA-256 follows
            yield _xet_hex(data[at : at + 32]), _xet_hex(name)
            at += 48


def _xet_hex(raw):
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _ranged(handler, path, headers):
    """A stored file, or the part of it that was asked for."""
    content = path.read_bytes()
    if not (asked := handler.headers.get("Range")):
        return 200, content, headers
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
    if int(first) >= len(content):
        raise Refused(416, "the range begins behind the end", headers={"Content-Range": f"bytes */{len(content)}"})
    end = int(last) + 1 if last else len(content)
    part = content[int(first) : end]
    return 206, part, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}


def _entry(path, file):
    lfs = {"lfs": {"oid": file["oid"], "size": file["size"], "pointerSize": 130}} if file["lfs"] else {}
    oid = hashlib.sha1(file["oid"].encode()).hexdigest() if file["lfs"] else file["oid"]
    return {"type": "file", "path": path, "size": file["size"], "oid": oid, **lfs}


def _mode(asked):
    """Binary files, and those that .gitattributes names, go to the large storage."""
    large = asked["path"].endswith(LFS_SUFFIXES) or b"\0" in base64.b64decode(asked["sample"])
    return "lfs" if large and asked["size"] else "regular"


def _card_errors(found):
    lists = [f'"{name}" must be an array' for name in ("tags", "datasets") if not isinstance(found.get(name, []), list)]
    relation = found.get("base_model_relation", "finetune")
    return [
        *lists,
        *(['"license" must be a string'] if not isinstance(found.get("license", ""), str | list) else []),
        *([] if relation in ("finetune", "adapter", "quantized", "merge") else [f"base_model_relation {relation}"]),
    ]
