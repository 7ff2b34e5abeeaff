//! Messages of DNS, as far as the resolver reads and writes them. Pure.
//!
//! Nothing of an upstream's answer is passed on: its addresses are put into an answer of our own.

use std::net::Ipv4Addr;

use simple_dns::{
    CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question as Asked, RCODE,
    ResourceRecord, TYPE,
    rdata::{A, OPT, RData},
};

/// Most bytes of a question.
pub(super) const QUESTION_MAX: usize = 1232;
/// Most bytes of an upstream's answer.
pub(super) const ANSWER_MAX: usize = 16 * 1024;
/// Most bytes of a datagram that every network passes, and that both sides say to take.
const DATAGRAM_MAX: u16 = 1232;
/// Most bytes of a datagram for who does not say.
const DATAGRAM_MIN: u16 = 512;
/// Most records of one section of an upstream's answer.
const RECORDS_MAX: u16 = 256;
/// Most aliases that are followed.
const ALIASES_MAX: usize = 16;
/// Most addresses of an answer.
const ADDRESSES_MAX: usize = 32;

/// Bytes before the first question.
const HEADER: usize = 12;

/// Question of a sandbox.
#[derive(Debug, Clone)]
pub(super) struct Question {
    id: u16,
    asked: Asked<'static>,
    recursion: bool,
    /// Bytes that an answer by UDP may have, if the sender says it.
    room: Option<u16>,
    /// Name in lower case without a dot at its end; `None` if it is no host name.
    pub(super) name: Option<String>,
    /// Subject of the question.
    pub(super) kind: Kind,
}

/// Subject of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Addresses of IPv4.
    Address,
    /// Facts that an allowed name has none of here: addresses of IPv6, and hints for HTTPS.
    Absent,
    /// Anything else.
    Other,
}

/// Answer to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Addresses, perhaps none, and how long they hold in seconds.
    Addresses(Vec<Ipv4Addr>, u32),
    /// There is no such name.
    NoName,
    /// The sandbox may not ask that.
    Refused,
    /// The question was not answered upstream, or the address could not be opened.
    Failed,
}

/// Way on which a message travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// Parses a question.
///
/// # Errors
/// With the reply to something else, if any is due.
pub(super) fn question(bytes: &[u8]) -> Result<Question, Option<Vec<u8>>> {
    let Some(header) = bytes.get(..HEADER) else { return Err(None) };
    let id = u16::from_be_bytes([header[0], header[1]]);
    if bytes.len() > QUESTION_MAX || header[2] & 0x80 != 0 {
        return Err(None);
    }
    let wrong = |code| Err(Some(encode(&blank(id, code))));
    // Before anything is parsed: the parser makes room for as many records as the header says.
    let [asked, answers, authorities, additional] = counts(header);
    if asked != 1 || answers != 0 || authorities != 0 || additional > 2 {
        return wrong(RCODE::FormatError);
    }
    let Ok(packet) = Packet::parse(bytes) else { return wrong(RCODE::FormatError) };
    let [asked] = &packet.questions[..] else { return wrong(RCODE::FormatError) };
    if packet.opcode() != OPCODE::StandardQuery || asked.qclass != QCLASS::CLASS(CLASS::IN) {
        return wrong(RCODE::NotImplemented);
    }
    let is = |kind| asked.qtype == QTYPE::TYPE(kind);
    let kind = if is(TYPE::A) {
        Kind::Address
    } else if is(TYPE::AAAA) || is(TYPE::HTTPS) {
        Kind::Absent
    } else {
        Kind::Other
    };
    Ok(Question {
        id,
        name: host_name(&asked.qname),
        kind,
        recursion: packet.has_flags(PacketFlag::RECURSION_DESIRED),
        room: packet.opt().map(|opt| opt.udp_packet_size),
        asked: asked.clone().into_owned(),
    })
}

/// Builds the reply to a question.
pub(super) fn reply(question: &Question, answer: &Answer, by: Transport) -> Vec<u8> {
    let (code, addresses, ttl) = match answer {
        Answer::Addresses(addresses, ttl) => (RCODE::NoError, &addresses[..], *ttl),
        Answer::NoName => (RCODE::NameError, &[][..], 0),
        Answer::Refused => (RCODE::Refused, &[][..], 0),
        Answer::Failed => (RCODE::ServerFailure, &[][..], 0),
    };
    let mut packet = blank(question.id, code);
    if question.recursion {
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    packet.questions.push(question.asked.clone());
    packet.answers = addresses
        .iter()
        .map(|address| {
            let data = RData::A(A::from(*address));
            ResourceRecord::new(question.asked.qname.clone(), CLASS::IN, ttl, data)
        })
        .collect();
    if question.room.is_some() {
        *packet.opt_mut() = Some(opt());
    }
    let bytes = encode(&packet);
    let room = question.room.unwrap_or_default().clamp(DATAGRAM_MIN, DATAGRAM_MAX);
    if by == Transport::Udp && bytes.len() > room.into() {
        packet.answers.clear();
        packet.set_flags(PacketFlag::TRUNCATION);
        return encode(&packet);
    }
    bytes
}

/// Builds the question for an upstream; empty for a name that cannot be asked for.
pub(super) fn ask(id: u16, name: &str) -> Vec<u8> {
    let Ok(qname) = Name::new(name) else { return Vec::new() };
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let (kind, class) = (QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN));
    packet.questions.push(Asked::new(qname, kind, class, false));
    *packet.opt_mut() = Some(opt());
    encode(&packet)
}

/// Reply of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// An answer for the sandbox.
    Answer(Answer),
    /// The answer is too long for a datagram.
    Truncated,
    /// No answer to this question; another upstream may have one.
    Refused,
    /// A message that is no reply to this question.
    Foreign,
}

/// Parses an upstream's reply to the question for this name.
pub(super) fn said(bytes: &[u8], id: u16, name: &str) -> Said {
    let Some(header) = bytes.get(..HEADER) else { return Said::Foreign };
    let [_, answers, authorities, additional] = counts(header);
    if [answers, authorities, additional].iter().any(|count| *count > RECORDS_MAX) {
        return Said::Foreign;
    }
    let Ok(packet) = Packet::parse(bytes) else { return Said::Foreign };
    let [asked] = &packet.questions[..] else { return Said::Foreign };
    let is_ours = packet.id() == id
        && packet.has_flags(PacketFlag::RESPONSE)
        && host_name(&asked.qname).as_deref() == Some(name)
        && asked.qtype == QTYPE::TYPE(TYPE::A)
        && asked.qclass == QCLASS::CLASS(CLASS::IN);
    if !is_ours {
        return Said::Foreign;
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Said::Truncated;
    }
    let code = packet.rcode();
    if code == RCODE::NoError {
        let (addresses, ttl) = addresses(&packet, key(&asked.qname));
        Said::Answer(Answer::Addresses(addresses, ttl))
    } else if code == RCODE::NameError {
        Said::Answer(Answer::NoName)
    } else {
        Said::Refused
    }
}

/// Follows the aliases of a name to its addresses. Also returns how long all of that holds.
fn addresses(packet: &Packet<'_>, mut name: Vec<u8>) -> (Vec<Ipv4Addr>, u32) {
    let mut ttl = u32::MAX;
    for _ in 0..ALIASES_MAX {
        let in_class = packet.answers.iter().filter(|record| record.class == CLASS::IN);
        let of_name: Vec<_> = in_class.filter(|record| key(&record.name) == name).collect();
        let found: Vec<_> = of_name
            .iter()
            .filter_map(|record| {
                let RData::A(one) = &record.rdata else { return None };
                Some((Ipv4Addr::from(one.address), record.ttl))
            })
            .take(ADDRESSES_MAX)
            .collect();
        if !found.is_empty() {
            let least = found.iter().map(|(_, ttl)| *ttl).min().unwrap_or_default();
            return (found.into_iter().map(|(address, _)| address).collect(), ttl.min(least));
        }
        let alias = of_name.iter().find_map(|record| {
            let RData::CNAME(alias) = &record.rdata else { return None };
            Some((key(&alias.0), record.ttl))
        });
        let Some((next, least)) = alias else { break };
        (name, ttl) = (next, ttl.min(least));
    }
    (Vec::new(), 0)
}

fn counts(header: &[u8]) -> [u16; 4] {
    [4, 6, 8, 10].map(|at| u16::from_be_bytes([header[at], header[at + 1]]))
}

fn blank(id: u16, code: RCODE) -> Packet<'static> {
    let mut packet = Packet::new_reply(id);
    packet.set_flags(PacketFlag::RECURSION_AVAILABLE);
    *packet.rcode_mut() = code;
    packet
}

fn opt() -> OPT<'static> {
    OPT { opt_codes: Vec::new(), udp_packet_size: DATAGRAM_MAX, version: 0 }
}

/// Encodes a message; one that cannot be encoded is empty, and is not sent.
fn encode(packet: &Packet<'_>) -> Vec<u8> {
    packet.build_bytes_vec_compressed().unwrap_or_default()
}

/// Labels of a name in lower case, each behind its length.
fn key(name: &Name<'_>) -> Vec<u8> {
    let mut key = Vec::new();
    for label in name.get_labels() {
        let bytes: &[u8] = label.as_ref();
        key.push(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
        key.extend(bytes.iter().map(u8::to_ascii_lowercase));
    }
    key
}

/// Returns a name as text if each label is one of a host name; an underscore is usual in some.
fn host_name(name: &Name<'_>) -> Option<String> {
    let labels = name.get_labels();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
    let text = |label: &[u8]| {
        let plain = !label.is_empty() && label.iter().all(is_plain);
        plain.then(|| String::from_utf8_lossy(label).to_ascii_lowercase())
    };
    let labels: Option<Vec<_>> = labels.iter().map(|label| text(label.as_ref())).collect();
    labels.map(|labels| labels.join(".")).filter(|name| !name.is_empty())
}
