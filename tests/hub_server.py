"""A server of the Hugging Face Hub's HTTP protocol, as far as the client needs it to publish and load models, and faults to inject.

Standard library only. Everything is in memory; `reset` empties it.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
TOKEN, READ_TOKEN, EXPIRED, OTHER_TOKEN = "hf_writer0123456789", "hf_reader0123456789", "hf_expired0123456789", "hf_other0123456789"


@dataclass
class Repo:
    """Commits are complete listings: path → bytes, or ("lfs", sha256, size)."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, files, message, branch="main"):
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(repr((parent, sorted(files.items()), message)).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def find(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


@dataclass
class Fault:
    """What to do instead of, or to, the answer of a step; `times` None is always."""

    step: str
    status: int | None = None
    body: object = None  # bytes → bytes
    drop: bool = False  # half of the answer
    silent: bool = False  # no answer at all
    headers: dict = field(default_factory=dict)
    times: int | None = None


class HubServer:
    """`server.url` is what HF_ENDPOINT should be. Runs once `start` was called."""

    def __init__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        # Large files lie on another host, as those of the Hub do.
        self.storage = self.url.replace("127.0.0.1", "localhost")
        self._lock = threading.RLock()
        self.reset()

    def start(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.lfs, self.faults, self.log = {}, {}, [], []
        self.users = {TOKEN: ("me", "write"), READ_TOKEN: ("me", "read"), OTHER_TOKEN: ("other", "write")}
        self.part_size = None

    @contextmanager
    def fault(self, step, **how):
        fault = Fault(step, **how)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def put(self, repo_id, files, **options):
        """Make a commit past the protocol."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id.split("/")[0]))
        for name, value in options.items():
            setattr(repo, name, value)
        stored = {name: self.store(content) if name.endswith(LFS_SUFFIXES) else content for name, content in files.items()}
        return repo.commit(stored, "put")

    def store(self, content):
        oid = hashlib.sha256(content).hexdigest()
        self.lfs[oid] = content
        return ("lfs", oid, len(content))

    def files(self, repo_id, revision="main"):
        """Content of a revision's files."""
        repo = self.repos[repo_id]
        return {
            name: self.lfs[value[1]] if isinstance(value, tuple) else value for name, value in repo.commits[repo.find(revision)].items()
        }

    def steps(self):
        """Names of the steps the client took."""
        return [step for step, *_ in self.log]


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status, code=None, message=None, **body):
        self.status, self.code, self.message, self.body = status, code, message, body


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("preupload", "POST", rf"/api/models/{ID}/preupload/(?P<rev>[^/]+)"),
    ("commit", "POST", rf"/api/models/{ID}/commit/(?P<rev>[^/]+)"),
    ("tag", "POST", rf"/api/models/{ID}/tag/(?P<rev>[^/]+)"),
    ("tree", "GET", rf"/api/models/{ID}/tree/(?P<rev>[^/]+)"),
    ("refs", "GET", rf"/api/models/{ID}/refs"),
    ("info", "GET", rf"/api/models/{ID}(/revision/(?P<rev>[^/]+))?"),
    ("batch", "POST", rf"/{ID}\.git/info/lfs/objects/batch"),
    ("upload", "PUT", r"/storage/upload/(?P<oid>\w+)(/(?P<part>\d+))?"),
    ("complete", "POST", r"/storage/complete/(?P<oid>\w+)"),
    ("verify", "POST", r"/storage/verify/(?P<oid>\w+)"),
    ("head", "HEAD", rf"/{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("get", "GET", rf"/{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("blob_head", "HEAD", r"/storage/(?P<oid>\w+)"),
    ("blob", "GET", r"/storage/(?P<oid>\w+)"),
]


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _serve(self):
            path = unquote(urlsplit(self.path).path)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raw = urlsplit(self.path).path
            found = ((step, re.fullmatch(pattern, raw)) for step, method, pattern in ROUTES if method == self.command)
            step, match = next(((step, match) for step, match in found if match), ("", None))
            if match is None:
                return self._send(404, {}, json.dumps({"error": f"no route {self.command} {path}"}).encode())
            with server._lock:
                server.log.append((step, path, self.headers.get("Authorization")))
                fault = next((f for f in server.faults if f.step == step and f.times != 0), None)
                if fault and fault.times:
                    fault.times -= 1
            if fault and fault.silent:
                self.close_connection = True
                return None
            if fault and fault.status:
                return self._send(fault.status, fault.headers, json.dumps({"error": "injected"}).encode())
            try:
                with server._lock:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    status, headers, content = getattr(self, f"do_{step}")(body, **parts)
            except Refused as refused:
                status, content = refused.status, json.dumps({"error": refused.message or "", **refused.body}).encode()
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            if not isinstance(content, bytes):
                headers, content = {"Content-Type": "application/json", **headers}, json.dumps(content).encode()
            self._send(status, headers, content, fault)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _send(self, status, headers, content, fault=None):
            if fault and fault.body:
                content = fault.body(content)
            self.send_response(status)
            for name, value in {**headers, **(fault.headers if fault else {})}.items():
                if value is not None:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if fault and fault.drop else content)
            if fault and fault.drop:
                self.close_connection = True

        # Who asks, and what for.

        def user(self):
            header = self.headers.get("Authorization")
            if header is None:
                return None, None
            found = server.users.get(header.removeprefix("Bearer "))
            if found is None:
                raise Refused(401, message="Invalid credentials in Authorization header")
            return found

        def repo(self, name, write=False):
            user, role = self.user()
            repo = server.repos.get(name)
            if repo is None or (repo.private and user != repo.owner):
                raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
            if repo.gated and user != repo.owner and not write:
                raise Refused(403 if user else 401, "GatedRepo", "Access to this repository is restricted")
            if write and (user != repo.owner or role != "write"):
                raise Refused(403, message=f"Forbidden: you must have write access to {name}")
            return repo

        def revision(self, repo, revision):
            oid = repo.find(revision)
            if oid is None and not (revision == "main" and not repo.commits):
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return oid

        # The protocol.

        def do_create(self, body):
            wanted, (user, role) = json.loads(body), self.user()
            if user is None:
                raise Refused(401, message="Invalid username or password.")
            owner = wanted.get("organization") or user
            name = f"{owner}/{wanted['name']}"
            if name in server.repos:
                raise Refused(409, message="You already created this model repo", url=f"{server.url}/{name}")
            if owner != user or role != "write":
                raise Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
            repo = server.repos[name] = Repo(owner, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
            repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            return 200, {}, {"url": f"{server.url}/{name}", "name": name, "id": "0"}

        def do_validate(self, body):
            ok = re.match(r"---\n.*?\n---\n", json.loads(body)["content"], re.S)
            return (200 if ok else 400), {}, {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []}

        def do_whoami(self, body):
            user, role = self.user()
            if user is None:
                raise Refused(401, message="Invalid credentials in Authorization header")
            return 200, {}, {"name": user, "orgs": [], "auth": {"accessToken": {"role": role}}}

        def do_info(self, body, id, rev="main"):
            repo = self.repo(id)
            oid = self.revision(repo, rev)
            names = [{"rfilename": name} for name in repo.commits.get(oid, {})]
            return 200, {}, {"id": id, "modelId": id, "sha": oid, "private": repo.private, "siblings": names}

        def do_refs(self, body, id):
            repo = self.repo(id)
            named = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
            refs = {
                kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": oid} for n, oid in found.items()]
                for kind, (ref, found) in named.items()
            }
            return 200, {}, {**refs, "converts": []}

        def do_tree(self, body, id, rev):
            repo = self.repo(id)
            entries = []
            for name, value in repo.commits[self.revision(repo, rev)].items():
                if isinstance(value, tuple):
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value[1]}\nsize {value[2]}\n".encode()
                    lfs = {"oid": value[1], "size": value[2], "pointerSize": len(pointer)}
                    entries.append({"type": "file", "path": name, "size": value[2], "oid": git_oid(pointer), "lfs": lfs})
                else:
                    entries.append({"type": "file", "path": name, "size": len(value), "oid": git_oid(value)})
            return 200, {}, entries

        def do_preupload(self, body, id, rev):
            repo = self.repo(id, write=True)
            self.revision(repo, rev)
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return 200, {}, {"files": modes}

        def do_batch(self, body, id):
            self.repo(id, write=True)
            wanted, objects = json.loads(body), []
            for entry in wanted["objects"]:
                oid = entry["oid"]
                if oid not in server.lfs:
                    verify = {"href": f"{server.url}/storage/verify/{oid}"}
                    upload = {"href": f"{server.url}/storage/upload/{oid}", "header": {}}
                    if server.part_size:
                        count = -(-entry["size"] // server.part_size)
                        urls = {str(i + 1): f"{server.url}/storage/upload/{oid}/{i + 1}" for i in range(count)}
                        upload = {"href": f"{server.url}/storage/complete/{oid}", "header": {"chunk_size": str(server.part_size), **urls}}
                    entry = {**entry, "actions": {"upload": upload, "verify": verify}}
                objects.append(entry)
            return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": objects}

        def do_upload(self, body, oid, part=None):
            server.lfs[(oid, int(part)) if part else oid] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

        def do_complete(self, body, oid):
            server.lfs[oid] = b"".join(server.lfs.pop((oid, part["partNumber"])) for part in json.loads(body)["parts"])
            return 200, {}, {}

        def do_verify(self, body, oid):
            if hashlib.sha256(server.lfs.get(oid, b"")).hexdigest() != oid:
                server.lfs.pop(oid, None)
                raise Refused(422, message="hash mismatch")
            return 200, {}, {}

        def do_commit(self, body, id, rev):
            repo = self.repo(id, write=True)
            head = self.revision(repo, rev)
            lines = [json.loads(line) for line in body.splitlines()]
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, message="A commit has happened since.")
            files = dict(repo.commits.get(head, {}))
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    assert value["oid"] in server.lfs
                    files[value["path"]] = ("lfs", value["oid"], len(server.lfs[value["oid"]]))
                else:
                    assert files.pop(value["path"], None) is not None
            oid = repo.commit(files, header["summary"], rev)
            return 200, {}, {"success": True, "commitOid": oid, "commitUrl": f"{server.url}/{id}/commit/{oid}"}

        def do_tag(self, body, id, rev):
            repo, tag = self.repo(id, write=True), json.loads(body)["tag"]
            if tag in repo.tags:
                raise Refused(409, message=f"Tag {tag} already exists")
            repo.tags[tag] = self.revision(repo, rev)
            return 200, {}, {}

        def do_get(self, body, id, rev, path):
            repo = self.repo(id)
            oid = self.revision(repo, rev)
            if path not in repo.commits.get(oid, {}):
                raise Refused(404, "EntryNotFound", "Entry not found")
            value, headers = repo.commits[oid][path], {"X-Repo-Commit": oid}
            if not isinstance(value, tuple):
                return 200, {**headers, "ETag": f'"{git_oid(value)}"'}, value
            linked = {"X-Linked-Etag": f'"{value[1]}"', "X-Linked-Size": str(value[2]), "Location": f"{server.storage}/storage/{value[1]}"}
            return 302, {**headers, **linked}, b""

        do_head = do_get

        def do_blob(self, body, oid):
            content, first = server.lfs[oid], 0
            if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                first = int(asked[1])
                span = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
                return 206, span, content[first:]
            return 200, {"ETag": f'"{oid}"'}, content

        do_blob_head = do_blob

    return Handler
