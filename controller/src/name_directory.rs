//! Tells every node which sandbox each host name by name leads to, so that any node finds the owner. Only changes are
//! sent; the digest in each answer shows whether the node has the same as we, and what differs is sent as a whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use proto::{
    agent::v1::{NameRange, NamedSandbox, SetNamesRequest},
    host::{CHANGES_MAX, FullName, NAMES_MAX},
    id::SandboxId,
    name::NodeName,
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval_at},
};
use tokio_util::sync::CancellationToken;

use crate::node::{self, Node, Nodes};

/// Time between two looks: changes within it are sent together.
const LOOK: Duration = Duration::from_secs(1);
/// Time after which a node is asked again for its digest: it may have lost its disk, or been upgraded.
const AGAIN: Duration = Duration::from_mins(1);
/// Most nodes that are told at once.
const AT_ONCE: usize = 32;

/// All names at one time.
#[derive(Debug, Default, PartialEq, Eq)]
struct Directory {
    names: BTreeMap<FullName, SandboxId>,
    digest: u64,
}

impl Directory {
    fn new(names: BTreeMap<FullName, SandboxId>) -> Self {
        let digest = names.iter().fold(0, |digest, (name, id)| digest ^ name.digest(id));
        Self { names, digest }
    }

    /// Returns requests that make a node's directory equal to this one, whatever it has.
    fn whole(&self) -> Vec<SetNamesRequest> {
        let names: Vec<_> = self.names.iter().collect();
        let mut requests = Vec::new();
        let mut after = String::new();
        let mut pages = names.chunks(CHANGES_MAX).peekable();
        while let Some(page) = pages.next() {
            let last = page.last().map(|(name, _)| name.to_string()).unwrap_or_default();
            // The last page drops all that comes behind it.
            let until = if pages.peek().is_some() { last } else { String::new() };
            requests.push(SetNamesRequest {
                replaced: Some(NameRange { after, until: until.clone() }),
                set: page.iter().map(|(name, id)| named(name, id)).collect(),
                ..SetNamesRequest::default()
            });
            after = until;
        }
        if requests.is_empty() {
            let replaced = Some(NameRange::default());
            requests.push(SetNamesRequest { replaced, ..SetNamesRequest::default() });
        }
        requests
    }

    /// Returns requests that turn `before` into this one.
    fn since(&self, before: &Self) -> Vec<SetNamesRequest> {
        let removed = before.names.keys().filter(|name| !self.names.contains_key(*name));
        let removed: Vec<String> = removed.map(ToString::to_string).collect();
        let is_new = |(name, id): &(&FullName, &SandboxId)| before.names.get(*name) != Some(*id);
        let set: Vec<_> = self.names.iter().filter(is_new).map(|(n, id)| named(n, id)).collect();
        let removals = removed.chunks(CHANGES_MAX).map(|removed| SetNamesRequest {
            removed: removed.to_vec(),
            ..SetNamesRequest::default()
        });
        let settings = set
            .chunks(CHANGES_MAX)
            .map(|set| SetNamesRequest { set: set.to_vec(), ..SetNamesRequest::default() });
        let mut requests: Vec<_> = removals.chain(settings).collect();
        // Mostly both fit into one.
        if removed.len() + set.len() <= CHANGES_MAX {
            requests = vec![SetNamesRequest { removed, set, ..SetNamesRequest::default() }];
        }
        requests
    }
}

fn named(name: &FullName, id: &SandboxId) -> NamedSandbox {
    NamedSandbox { name: name.to_string(), sandbox_id: id.to_string() }
}

/// State of a node after it was told last.
#[derive(Debug)]
struct Told {
    /// Directory that it has; `None` when that is not known.
    has: Option<Arc<Directory>>,
    /// Whether its agent is of a version without names.
    is_too_old: bool,
    /// Whether the last call failed, so that a node that does not answer is logged once.
    has_failed: bool,
    at: Instant,
}

/// Requests that several nodes get.
type Requests = Arc<[SetNamesRequest]>;

/// The changes since the directories that nodes have, of which most have the same.
#[derive(Debug, Default)]
struct Changes(Vec<(Arc<Directory>, Requests)>);

impl Changes {
    fn since(&mut self, before: &Arc<Directory>, now: &Directory) -> Requests {
        if let Some((_, known)) = self.0.iter().find(|(of, _)| Arc::ptr_eq(of, before)) {
            return known.clone();
        }
        let requests: Requests = now.since(before).into();
        self.0.push((before.clone(), requests.clone()));
        requests
    }
}

/// Tells the nodes of one controller.
#[derive(Debug)]
pub(crate) struct Teller {
    nodes: Arc<Nodes>,
    is_enabled: bool,
    /// All names, with the version of the inventory that they are of.
    current: (u64, Arc<Directory>),
    told: BTreeMap<NodeName, Told>,
    /// Nodes that are being told now.
    calling: BTreeSet<NodeName>,
}

impl Teller {
    /// Creates a teller. If names are not enabled, the nodes are told that.
    pub(crate) fn new(nodes: Arc<Nodes>, is_enabled: bool) -> Self {
        let (current, told, calling) = Default::default();
        Self { nodes, is_enabled, current, told, calling }
    }

    /// Tells all nodes until `stop`: each when it connects and when names change, and looks once a minute whether it
    /// still has them. A node that does not answer holds up no other one.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut looks = interval_at(Instant::now() + LOOK, LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calls: FuturesUnordered<BoxFuture<'static, Answer>> = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(answer) = calls.next() => self.note(answer),
                _ = looks.tick() => {
                    // Another controller has taken over.
                    if self.nodes.epoch.fenced() {
                        continue;
                    }
                    self.look().await;
                    for (node, requests) in self.due() {
                        self.calling.insert(node.name.clone());
                        let (nodes, wanted) = (self.nodes.clone(), self.current.1.clone());
                        let call = tell(nodes, node, requests, wanted, self.is_enabled);
                        calls.push(call.boxed());
                    }
                }
            }
        }
    }

    async fn look(&mut self) {
        let version = self.nodes.cache.names_version();
        if !self.is_enabled || version == self.current.0 {
            return;
        }
        let nodes = self.nodes.clone();
        // On a thread of its own: 100,000 names take a while.
        let read = spawn_blocking(move || Directory::new(nodes.cache.open_by_name(NAMES_MAX)));
        let Ok(fresh) = read.await else { return };
        if fresh.names.len() == NAMES_MAX {
            tracing::warn!(
                max = NAMES_MAX,
                "too many sandboxes have names: some have no host name"
            );
        }
        let directory =
            if fresh == *self.current.1 { self.current.1.clone() } else { fresh.into() };
        self.current = (version, directory);
    }

    /// Returns the nodes that are to be told now, with the changes; `None` where it is not known what the node has.
    fn due(&mut self) -> Vec<(Arc<Node>, Option<Requests>)> {
        self.told.retain(|node, _| self.nodes.get(node).is_some());
        let (now, current) = (Instant::now(), &self.current.1);
        let is_due = |node: &Arc<Node>| {
            let told = self.told.get(&node.name);
            let fits = |told: &Told| {
                told.is_too_old || told.has.as_ref().is_some_and(|has| Arc::ptr_eq(has, current))
            };
            let is_free = node.down().is_none() && !self.calling.contains(&node.name);
            is_free && told.is_none_or(|told| !fits(told) || now >= told.at + AGAIN)
        };
        let mut due: Vec<_> = self.nodes.all().into_iter().filter(is_due).collect();
        // Nodes that never answer must not take all the places again and again.
        due.sort_by_key(|node| self.told.get(&node.name).map(|told| told.at));
        due.truncate(AT_ONCE.saturating_sub(self.calling.len()));
        let mut changes = Changes::default();
        let with_changes = due.into_iter().map(|node| {
            let has = self.told.get(&node.name).and_then(|told| told.has.as_ref());
            let requests = has.map(|has| changes.since(has, current));
            (node, requests)
        });
        with_changes.collect()
    }

    fn note(&mut self, answer: Answer) {
        let Answer { node, wanted, sent, at } = answer;
        self.calling.remove(&node);
        let failed_before = self.told.get(&node).is_some_and(|told| told.has_failed);
        let has_failed = sent.is_err();
        let sent = sent.unwrap_or_else(|error| {
            // It is tried again each second.
            if !failed_before {
                tracing::warn!(%node, %error, "the names of sandboxes were not sent to the node");
            }
            Sent::Unknown
        });
        let has = (sent == Sent::Same).then_some(wanted);
        let told = Told { has, is_too_old: sent == Sent::TooOld, has_failed, at };
        self.told.insert(node, told);
    }
}

/// Result of one call, and what it was about.
#[derive(Debug)]
struct Answer {
    node: NodeName,
    wanted: Arc<Directory>,
    sent: node::Result<Sent>,
    /// Time at which it was sent.
    at: Instant,
}

/// Tells one node.
async fn tell(
    nodes: Arc<Nodes>,
    node: Arc<Node>,
    requests: Option<Requests>,
    wanted: Arc<Directory>,
    is_enabled: bool,
) -> Answer {
    let (at, epoch) = (Instant::now(), nodes.epoch.get());
    let complete = |request: &SetNamesRequest| SetNamesRequest {
        epoch,
        enabled: is_enabled,
        ..request.clone()
    };
    let sent = send(&node, requests.as_deref(), &wanted, complete).await;
    let sent = sent.inspect_err(|error| nodes.fence_if_replaced(error));
    Answer { node: node.name.clone(), wanted, sent, at }
}

/// Result of telling a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// The node has the same directory as we.
    Same,
    /// The node has another one, or it is not known: it is told again.
    Unknown,
    /// Its agent knows no names.
    TooOld,
}

/// Sends changes, or everything where it is not known what the node has and the node has something else.
async fn send(
    node: &Node,
    changes: Option<&[SetNamesRequest]>,
    wanted: &Directory,
    complete: impl Fn(&SetNamesRequest) -> SetNamesRequest,
) -> node::Result<Sent> {
    let asking = [SetNamesRequest::default()];
    let first = changes.unwrap_or(&asking);
    let whole = if changes.is_none() { wanted.whole() } else { Vec::new() };
    let mut digest = 0;
    for (number, request) in first.iter().chain(&whole).enumerate() {
        if number == first.len() && digest == wanted.digest {
            break;
        }
        match node.client.set_names(complete(request)).await? {
            Some(told) => digest = told,
            None => return Ok(Sent::TooOld),
        }
    }
    Ok(if digest == wanted.digest { Sent::Same } else { Sent::Unknown })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn directory(names: impl IntoIterator<Item = (usize, u8)>) -> Directory {
        let entry = |(name, id): (usize, u8)| {
            let name = format!("box{name}--red").parse().expect("a name");
            (name, SandboxId::new(1, &[id; 10]))
        };
        Directory::new(names.into_iter().map(entry).collect())
    }

    /// Applies requests as an agent does.
    fn apply(names: &mut BTreeMap<FullName, SandboxId>, requests: &[SetNamesRequest]) {
        let parse = |text: &str| text.parse::<FullName>().expect("a name");
        for request in requests {
            assert!(request.set.len() + request.removed.len() <= CHANGES_MAX);
            assert!(request.encoded_len() < proto::MESSAGE_BYTES_MAX / 4);
            if let Some(NameRange { after, until }) = &request.replaced {
                names.retain(|name, _| {
                    let is_after = after.is_empty() || *name > parse(after);
                    !(is_after && (until.is_empty() || *name <= parse(until)))
                });
            }
            names.retain(|name, _| !request.removed.contains(&name.to_string()));
            for NamedSandbox { name, sandbox_id } in &request.set {
                names.insert(parse(name), sandbox_id.parse().expect("an id"));
            }
        }
    }

    #[test]
    fn whole_directory_replaces_anything() {
        let strange = directory((0..9000).map(|name| (name * 7, 9)));
        for count in [0, 1, CHANGES_MAX, CHANGES_MAX + 1, 3 * CHANGES_MAX] {
            let wanted = directory((0..count).map(|name| (name, 1)));
            let mut names = strange.names.clone();
            apply(&mut names, &wanted.whole());
            assert_eq!(Directory::new(names), wanted, "{count}");
        }
    }

    #[test]
    fn changes_lead_from_one_directory_to_another() {
        let many =
            |skip, id| directory((0..5000).filter(move |n| n % skip != 0).map(move |n| (n, id)));
        let all = [directory([]), directory([(1, 1), (2, 2)]), many(2, 1), many(3, 1), many(3, 2)];
        for before in &all {
            for wanted in &all {
                let mut names = before.names.clone();
                apply(&mut names, &wanted.since(before));
                assert_eq!(&Directory::new(names), wanted);
            }
        }
    }

    #[test]
    fn one_creation_costs_a_node_less_than_200_bytes() {
        let before = directory((0..10_000).map(|name| (name, 1)));
        let after = directory((0..10_001).map(|name| (name, 1)));
        let requests = after.since(&before);
        let bytes: usize = requests.iter().map(SetNamesRequest::encoded_len).sum();
        assert!((50..200).contains(&bytes), "{bytes}");
        assert_eq!(requests.len(), 1);
    }
}
