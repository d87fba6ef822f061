"""Options of `mmtool serve` alone: the server, its capacity, media of requests."""

import math
import re
from dataclasses import dataclass

from mmtool.errors import MMToolError
from mmtool.groups.checks import require, unset_or
from mmtool.options import opt

_ORIGIN = re.compile(r"https?://[^/\s?#]+")  # as browsers send it: no path, no slash behind


@dataclass(kw_only=True)
class ServerArgs:
    """Server"""

    host: str = opt("127.0.0.1", "Address to listen at; 0.0.0.0 is every one of this machine.", metavar="ADDRESS")
    port: int = opt(8000, "Port to listen at; 0 takes a free one and says which.")
    api_key: list[str] = opt([], "Keys, any of which opens the server; none lets everybody in.", metavar="KEY ...")
    api_key_file: str | None = opt(None, "File with keys, one on each line.", metavar="FILE")
    served_model_name: list[str] = opt(
        [], "What clients may call the model; answers have the first. Default: its type or folder.", metavar="NAME ..."
    )
    cors_origins: list[str] = opt(
        [], "Web pages of these origins may ask, such as https://chat.example.com; * for all.", metavar="ORIGIN ..."
    )
    web_ui: bool = opt(False, "Also serve a page to chat on, at /ui (extra ui).")
    log_requests: bool = opt(False, "Write questions and answers to the log; otherwise no text of theirs gets there.")
    shutdown_timeout: float = opt(30.0, "Seconds that running answers get at SIGTERM before they are cut.")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "a number from 0 to 65535")
        seconds = self.shutdown_timeout
        require(math.isfinite(seconds) and seconds >= 0, "shutdown_timeout", seconds, "a number from 0")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise MMToolError(
                    f"--cors_origins {origin}: not an origin", "Write it as https://chat.example.com, or *."
                )


@dataclass(kw_only=True)
class CapacityArgs:
    """Capacity"""

    max_num_seqs: int = opt(16, "Most answers under way at once.")
    max_model_len: int | None = opt(
        None, "Most positions of a prompt and its answer. Default: the model's own limit, or what memory allows."
    )
    max_queue: int | None = opt(
        None, "Most requests that wait; more are refused with 429. Default: four times --max_num_seqs."
    )
    lora_modules: list[str] = opt(
        [], "LoRA adapters that clients choose by name as if they were models.", metavar="NAME=FOLDER ..."
    )
    max_request_mib: float = opt(32.0, "Largest request, in MiB.")
    compile: bool | None = opt(
        None, "Replay the steps of answers from CUDA graphs, recorded as they are needed. Default: on a GPU."
    )
    pack_weights: bool | None = opt(
        None,
        "Hold a second copy of the weights that several answers at once are faster with; float32 on a CPU gains. "
        "Default: where memory allows it.",
    )
    prompts_beside: bool | None = opt(
        None,
        "Compute prompts in a second thread while answers go on; for a CPU. Default: where torch's threads "
        "(OMP_NUM_THREADS) leave as many cores free as they use.",
    )

    def __post_init__(self) -> None:
        require(self.max_num_seqs > 0, "max_num_seqs", self.max_num_seqs, "a number above 0")
        require(unset_or(self.max_model_len, lambda n: n > 1), "max_model_len", self.max_model_len, "2 or more")
        require(unset_or(self.max_queue, lambda n: n >= 0), "max_queue", self.max_queue, "a number from 0")
        require(0 < self.max_request_mib <= 4096, "max_request_mib", self.max_request_mib, "a number above 0")
        names = [module.partition("=")[0] for module in self.lora_modules]
        for module, name in zip(self.lora_modules, names, strict=True):
            if not name or not module.partition("=")[2]:
                raise MMToolError(f"--lora_modules {module} is not NAME=FOLDER", "Write it as legal=/runs/legal.")
            if names.count(name) > 1:
                raise MMToolError(f"--lora_modules has {name} twice", "Give each adapter a name of its own.")


@dataclass(kw_only=True)
class RequestMediaArgs:
    """Pictures and sounds of requests"""

    allowed_local_media_path: str | None = opt(
        None, "Folder whose files requests may name as file:// URLs. Default: none.", metavar="FOLDER"
    )
    allowed_media_domains: list[str] = opt(
        [], "Hosts that may be asked for media, such as *.example.com. Default: every public one.", metavar="HOST ..."
    )
    allowed_media_schemes: list[str] = opt(["https"], "URLs that are fetched: https, http.", metavar="SCHEME ...")
    allow_private_media: bool = opt(
        False, "The hosts of --allowed_media_domains may be on this machine or in its network."
    )
    max_media_per_request: int = opt(16, "Most pictures and sounds in a request.")
    max_media_mib: float = opt(20.0, "Largest picture or sound, in MiB.")
    max_pixels: int = opt(50_000_000, "Largest picture, width times height.")
    media_timeout: float = opt(10.0, "Seconds for a download, from looking up the name to the last byte.")

    def __post_init__(self) -> None:
        for scheme in self.allowed_media_schemes:
            if scheme not in ("http", "https"):
                raise MMToolError(f"--allowed_media_schemes {scheme}: not a scheme to fetch from", "Use https or http.")
        if self.allow_private_media and not self.allowed_media_domains:
            raise MMToolError(
                "--allow_private_media true needs --allowed_media_domains", "Name the hosts that may be asked."
            )
        count = self.max_media_per_request
        require(count >= 0, "max_media_per_request", count, "a number from 0")
        require(0 < self.max_media_mib <= 4096, "max_media_mib", self.max_media_mib, "a number above 0")
        require(self.max_pixels > 0, "max_pixels", self.max_pixels, "a number above 0")
        require(0 < self.media_timeout <= 3600, "media_timeout", self.media_timeout, "a number above 0")
