"""Certificates for tests, of an authority that nobody else knows: made here, so that no program and no secret is kept.

ECDSA over P-256, as FIPS 186-4 has it, in DER, as X.690 has it. Fit for tests only: it takes no care of its timing.
"""

from __future__ import annotations

import secrets
from base64 import encodebytes
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from ipaddress import ip_address
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from pathlib import Path

# The curve: y² = x³ - 3x + b over a prime field, a point on it, and how many points there are.
PRIME = 2**256 - 2**224 + 2**192 + 2**96 - 1
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
BASE = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
SIZE = 32

BOOLEAN, INTEGER, BITS, OCTETS, OID, TEXT, TIME, SEQUENCE, SET = 1, 2, 3, 4, 6, 12, 24, 48, 49
DNS_NAME, IP_NAME, KEY_ID = 0x82, 0x87, 0x80
PUBLIC_KEY, CURVE, SIGNED = "1.2.840.10045.2.1", "1.2.840.10045.3.1.7", "1.2.840.10045.4.3.2"
COMMON_NAME = "2.5.4.3"
SUBJECT_KEY, KEY_USAGE, OTHER_NAMES, CONSTRAINTS, AUTHORITY_KEY = (f"2.5.29.{n}" for n in (14, 15, 17, 19, 35))
TRUE = bytes([BOOLEAN, 1, 255])
SIGNS_CERTIFICATES, SIGNS_DATA = bytes([BITS, 2, 2, 4]), bytes([BITS, 2, 7, 128])
VALID = timedelta(days=1)

Point = tuple[int, int]


def _sum(one: Point | None, other: Point | None) -> Point | None:
    """The sum of two points; None is the one at infinity."""
    if one is None or other is None:
        return one or other
    if one[0] == other[0] and (one[1] + other[1]) % PRIME == 0:
        return None
    if one == other:
        slope = (3 * one[0] * one[0] - 3) * pow(2 * one[1], -1, PRIME) % PRIME
    else:
        slope = (other[1] - one[1]) * pow(other[0] - one[0], -1, PRIME) % PRIME
    x = (slope * slope - one[0] - other[0]) % PRIME
    return x, (slope * (one[0] - x) - one[1]) % PRIME


def _times(number: int) -> Point:
    """So many times the base."""
    found: Point | None = None
    power: Point | None = BASE
    while number:
        if number & 1:
            found = _sum(found, power)
        number, power = number >> 1, _sum(power, power)
    assert found is not None, "a secret is less than the order"
    return found


def _der(tag: int, *parts: bytes) -> bytes:
    """A value with its tag and its length."""
    body = b"".join(parts)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8)
    return bytes([tag]) + (bytes([len(body)]) if len(body) < 128 else bytes([128 + len(size)]) + size) + body


def _integer(number: int) -> bytes:
    return _der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1))


def _oid(text: str) -> bytes:
    first, second, *rest = map(int, text.split("."))
    body = bytes([first * 40 + second])
    for number in rest:
        digits = [number & 127]
        while number := number >> 7:
            digits.append(number & 127 | 128)
        body += bytes(reversed(digits))
    return _der(OID, body)


def _name(text: str) -> bytes:
    return _der(SEQUENCE, _der(SET, _der(SEQUENCE, _oid(COMMON_NAME), _der(TEXT, text.encode()))))


def _time(moment: datetime) -> bytes:
    return _der(TIME, f"{moment:%Y%m%d%H%M%SZ}".encode())


def _extension(oid: str, *value: bytes, is_critical: bool = False) -> bytes:
    return _der(SEQUENCE, _oid(oid), TRUE if is_critical else b"", _der(OCTETS, *value))


def _other_name(host: str) -> bytes:
    try:
        return _der(IP_NAME, ip_address(host).packed)
    except ValueError:
        return _der(DNS_NAME, host.encode())


class _Key:
    """A secret number, and the point that everybody may know."""

    def __init__(self) -> None:
        self.secret = 1 + secrets.randbelow(ORDER - 1)
        point = _times(self.secret)
        self._point = b"\0\4" + point[0].to_bytes(SIZE) + point[1].to_bytes(SIZE)
        self._kind = _der(SEQUENCE, _oid(PUBLIC_KEY), _oid(CURVE))

    @property
    def public(self) -> bytes:
        """As a certificate has it."""
        return _der(SEQUENCE, self._kind, _der(BITS, self._point))

    @property
    def id(self) -> bytes:
        """By what certificates name it."""
        return sha1(self._point[1:], usedforsecurity=False).digest()

    @property
    def private(self) -> bytes:
        """As a file of keys has it (PKCS 8)."""
        own = _der(SEQUENCE, _integer(1), _der(OCTETS, self.secret.to_bytes(SIZE)))
        return _der(SEQUENCE, _integer(0), self._kind, _der(OCTETS, own))

    def signed(self, data: bytes) -> bytes:
        """The signature below data, with a number that is used once."""
        once = 1 + secrets.randbelow(ORDER - 1)
        r = _times(once)[0] % ORDER
        s = pow(once, -1, ORDER) * (int.from_bytes(sha256(data).digest()) + r * self.secret) % ORDER
        return _der(SEQUENCE, _integer(r), _integer(s))


class Pair(Struct, frozen=True):
    """Where a certificate and its key are."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates, each valid for a day around now."""

    def __init__(self, folder: Path, name: str = "an authority of tests") -> None:
        self._folder, self._issuer, self._key = folder, name, _Key()
        self.certificate = folder / f"{sha256(self._key.id).hexdigest()[:8]}.pem"
        extensions = (
            _extension(CONSTRAINTS, _der(SEQUENCE, TRUE), is_critical=True),
            _extension(KEY_USAGE, SIGNS_CERTIFICATES, is_critical=True),
        )
        self._write(self.certificate, "CERTIFICATE", self._certificate(name, self._key, extensions))

    def pair(self, host: str) -> Pair:
        """A certificate for a host, and its key."""
        key = _Key()
        stem = sha256(key.id).hexdigest()[:8]
        pair = Pair(self._folder / f"{stem}.crt", self._folder / f"{stem}.key")
        extensions = (
            _extension(OTHER_NAMES, _der(SEQUENCE, _other_name(host))),
            _extension(KEY_USAGE, SIGNS_DATA, is_critical=True),
        )
        self._write(pair.certificate, "CERTIFICATE", self._certificate(host, key, extensions))
        self._write(pair.key, "PRIVATE KEY", key.private)
        return pair

    def _certificate(self, subject: str, key: _Key, extensions: tuple[bytes, ...]) -> bytes:
        now, algorithm = datetime.now(UTC), _der(SEQUENCE, _oid(SIGNED))
        known = (
            _extension(SUBJECT_KEY, _der(OCTETS, key.id)),
            _extension(AUTHORITY_KEY, _der(SEQUENCE, _der(KEY_ID, self._key.id))),
        )
        data = _der(
            SEQUENCE,
            _der(0xA0, _integer(2)),
            _integer(secrets.randbits(64)),
            algorithm,
            _name(self._issuer),
            _der(SEQUENCE, _time(now - VALID), _time(now + VALID)),
            _name(subject),
            key.public,
            _der(0xA3, _der(SEQUENCE, *extensions, *known)),
        )
        return _der(SEQUENCE, data, algorithm, _der(BITS, b"\0", self._key.signed(data)))

    @staticmethod
    def _write(path: Path, what: str, data: bytes) -> None:
        path.write_bytes(
            b"-----BEGIN %b-----\n%b-----END %b-----\n" % (what.encode(), encodebytes(data), what.encode())
        )
