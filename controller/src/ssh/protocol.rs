//! Protocol of the server: algorithms, and the bounds of russh.

use std::{borrow::Cow, time::Duration};

use russh::{
    Limits, MethodKind, MethodSet, Preferred, SshId, cipher, compression, kex,
    keys::{Algorithm, EcdsaCurve, PrivateKey},
    server::Config,
};

/// Window of a channel, bytes.
pub(super) const WINDOW: u32 = 1024 * 1024;
/// Window of a channel while the client is slowed down: bytes of a round trip.
pub(super) const SMALL_WINDOW: u32 = 2;
/// Largest packet of a channel, bytes.
const PACKET: u32 = 32 * 1024;
/// Time of every refusal, so that none tells more than another.
const REFUSAL: Duration = Duration::from_millis(500);
/// Tries to log in. A client's first question, which methods there are, is one of them; then nine keys: ssh-agent's
/// are offered one after another. What slows down a stranger is the time of each refusal.
const TRIES: usize = 10;
/// Time after which a silent client is asked for a sign of life; after three without one it is gone.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVES: usize = 3;
/// Time after which a client that takes no bytes is gone.
const STUCK: Duration = Duration::from_secs(300);
/// Bytes in one direction, and time, after which the keys of a connection change.
const REKEY: (usize, Duration) = (1 << 30, Duration::from_secs(3600));

const KEX: &[kex::Name] = &[
    kex::MLKEM768X25519_SHA256,
    kex::CURVE25519,
    kex::CURVE25519_PRE_RFC_8731,
    kex::EXTENSION_SUPPORT_AS_SERVER,
    kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER,
];
/// Authenticated ciphers alone: there is no separate MAC to choose.
const CIPHERS: &[cipher::Name] = &[cipher::AES_256_GCM, cipher::CHACHA20_POLY1305];
const KEYS: &[Algorithm] = &[
    Algorithm::Ed25519,
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
    Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
    Algorithm::SkEd25519,
    Algorithm::SkEcdsaSha2NistP256,
];

/// Builds the configuration of russh.
pub(super) fn config(key: PrivateKey) -> Config {
    Config {
        server_id: SshId::Standard(Cow::Borrowed("SSH-2.0-pve-sandbox")),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: REFUSAL,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key],
        limits: Limits::new(REKEY.0, REKEY.0, REKEY.1),
        window_size: WINDOW,
        maximum_packet_size: PACKET,
        // Nothing is received through russh's own queues.
        channel_buffer_size: 1,
        event_buffer_size: 32,
        preferred: Preferred {
            kex: Cow::Borrowed(KEX),
            key: Cow::Borrowed(KEYS),
            cipher: Cow::Borrowed(CIPHERS),
            compression: Cow::Borrowed(&[compression::NONE]),
            ..Preferred::DEFAULT
        },
        max_auth_attempts: TRIES,
        inactivity_timeout: Some(STUCK),
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: KEEPALIVES,
        ..Config::default()
    }
}
