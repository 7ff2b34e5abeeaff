//! Callers that change who reaches a sandbox, and what it reaches. Each sandbox has one port and its egress; the
//! answers bound how far either is open. Another team's callers try the same, in vain.

use agent::journal::{Feed, Journal, MemoryJournal, Phase, Record};
use proto::{
    name::Port,
    sandbox::v1::{
        Egress, ExposeHttpServiceRequest, HideHttpServiceRequest, RevokeAccessRequest, Sandbox,
        Visibility as Wire,
    },
    spec,
    visibility::Visibility,
};
use tonic::Status;

use crate::{
    calls::{CameTo, Line, Memory},
    cluster::Cluster,
    lives::Life,
};

/// Port of every sandbox that callers open and close.
const PORT: u32 = 8001;
/// Name of its service.
const SERVICE: &str = "web";

/// Change that a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Everybody reaches the port.
    Expose,
    /// Whoever has a token reaches the port.
    Guard,
    Hide,
    /// The credentials of the port become void.
    Revoke,
    OpenEgress,
    CloseEgress,
}

/// All orders; repeated ones are more frequent.
pub(crate) const ORDERS: [Order; 9] = [
    Order::Expose,
    Order::Expose,
    Order::Guard,
    Order::Hide,
    Order::Hide,
    Order::Hide,
    Order::Revoke,
    Order::OpenEgress,
    Order::CloseEgress,
];

/// How far something is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Closed,
    Guarded,
    Open,
}

/// How far something is open at most, by the answers.
#[derive(Debug, Clone, Default)]
struct Bound {
    /// The bound; `None` while it is unknown.
    most: Option<Level>,
    /// Widest change that had no answer: it may be made at any time.
    lost: Option<Level>,
    /// Number of calls in progress.
    calls: u32,
    /// Whether these overlap, so that nobody knows which one is carried out last.
    overlap: bool,
}

impl Bound {
    fn asked(&mut self, level: Level) {
        self.overlap = self.calls > 0;
        self.calls += 1;
        self.most = self.most.filter(|most| *most >= level);
    }

    fn answered(&mut self, level: Level, outcome: Outcome) {
        self.calls -= 1;
        match outcome {
            Outcome::Done if !self.overlap => self.most = self.lost.max(Some(level)),
            Outcome::Done | Outcome::Refused => {}
            Outcome::Unknown => self.lost = self.lost.max(Some(level)),
        }
    }
}

/// Knowledge of the callers about the port and the egress of a sandbox.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    port: Bound,
    egress: Bound,
}

impl Access {
    /// Returns the bound that an order changes, and its level; `None`: the order opens and closes nothing.
    fn of(&mut self, order: Order) -> Option<(&mut Bound, Level)> {
        Some(match order {
            Order::Expose => (&mut self.port, Level::Open),
            Order::Guard => (&mut self.port, Level::Guarded),
            Order::Hide => (&mut self.port, Level::Closed),
            Order::Revoke => return None,
            Order::OpenEgress => (&mut self.egress, Level::Open),
            Order::CloseEgress => (&mut self.egress, Level::Closed),
        })
    }

    pub(crate) fn asked(&mut self, order: Order) {
        if let Some((bound, level)) = self.of(order) {
            bound.asked(level);
        }
    }

    /// Records an answer. Returns whether the change is made.
    pub(crate) fn answered(&mut self, Answer { order, outcome, .. }: &Answer) -> bool {
        if let Some((bound, level)) = self.of(*order) {
            bound.answered(level, *outcome);
        }
        *outcome == Outcome::Done
    }

    /// Records that an earlier controller's orders may be carried out again.
    pub(crate) fn forget(&mut self) {
        for bound in [&mut self.port, &mut self.egress] {
            (bound.most, bound.lost) = (None, Some(Level::Open));
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// The order was not carried out, and will not be.
    Refused,
    /// The order may still be carried out.
    Unknown,
}

/// Result of a call.
pub(crate) struct Answer {
    pub(crate) key: String,
    order: Order,
    outcome: Outcome,
}

/// Asks a controller for a change.
pub(crate) fn change(
    cluster: &Cluster,
    life: &Life,
    key: String,
    id: String,
    order: Order,
) -> impl Future<Output = Option<Answer>> + Send + use<> {
    let line = Line::to(cluster, life);
    async move {
        let outcome = match sent(&line, id, order).await {
            Ok(()) => {
                line.obeyed(&format!("did {order:?} to {key}"));
                Outcome::Done
            }
            Err(status) if matches!(line.refused(&status), CameTo::Refused) => Outcome::Refused,
            Err(_) => Outcome::Unknown,
        };
        Some(Answer { key, order, outcome })
    }
}

/// Asks for the same as another team, which must not get it.
pub(crate) fn trespass(
    cluster: &Cluster,
    life: &Life,
    id: String,
    order: Order,
) -> impl Future<Output = Option<Answer>> + Send + use<> {
    let line = Line::of_another_team(cluster, life);
    async move {
        if sent(&line, id.clone(), order).await.is_ok() {
            line.watch.wrong(format!("I5: another team did {order:?} to {id}"));
        }
        None
    }
}

async fn sent(line: &Line, id: String, order: Order) -> Result<(), Status> {
    let mut api = line.api.clone();
    match order {
        Order::Expose | Order::Guard => {
            let who = if order == Order::Expose { Wire::Public } else { Wire::Token };
            let request = ExposeHttpServiceRequest {
                id,
                name: SERVICE.into(),
                port: PORT,
                visibility: who.into(),
            };
            api.expose_http_service(line.ask(request)).await?;
        }
        Order::Hide => {
            let request = HideHttpServiceRequest { id, name: SERVICE.into() };
            api.hide_http_service(line.ask(request)).await?;
        }
        Order::Revoke => {
            let request = RevokeAccessRequest { id, service: SERVICE.into() };
            api.revoke_access(line.ask(request)).await?;
        }
        Order::OpenEgress | Order::CloseEgress => {
            let egress = if order == Order::OpenEgress { Egress::Open } else { Egress::None };
            let change = Sandbox { id, egress: egress.into(), ..Sandbox::default() };
            let request = proto::update::request(change, &["egress"]);
            api.update_sandbox(line.ask(request)).await?;
        }
    }
    Ok(())
}

fn port() -> Port {
    Port::try_from(PORT).expect("a port")
}

/// Checks I6 on a sandbox that can be reached: nothing is open further than its callers were told.
pub(crate) fn too_open(record: &Record, memory: &Memory) -> Vec<String> {
    let known = memory.get(record.request_id.as_str());
    let known = known.filter(|known| known.id == Some(record.id.to_string()));
    // Nothing reaches a sandbox in another phase. A stopped one that moves is in two journals for a while.
    let is_up = matches!(record.phase, Phase::Running | Phase::Paused);
    let Some(known) = known.filter(|_| is_up) else { return Vec::new() };
    let of_port = match record.visibility(port()) {
        None => Level::Closed,
        Some(Visibility::Public) => Level::Open,
        Some(Visibility::Team | Visibility::Token | Visibility::Private) => Level::Guarded,
    };
    let of_egress = match record.egress {
        spec::Egress::None => Level::Closed,
        spec::Egress::Open | spec::Egress::Allow(_) => Level::Open,
    };
    let Access { port, egress } = &known.access;
    let both = [("port", port, of_port), ("egress", egress, of_egress)];
    let over = both.into_iter().filter(|(_, bound, is)| bound.most.is_some_and(|most| *is > most));
    let wrong = over.map(|(what, bound, is)| {
        let most = bound.most;
        format!("I6: the {what} of {} was answered as {most:?} at most, and is {is:?}", record.id)
    });
    wrong.collect()
}

/// Opens the port of all sandboxes in a journal to everybody, as an agent would that forgets who may reach it.
pub(crate) async fn reopen(journal: &MemoryJournal) {
    for mut record in journal.all().await.expect("a journal") {
        if record.phase.ended() || record.visibility(port()) == Some(Visibility::Public) {
            continue;
        }
        let public = Visibility::Public;
        record.open((SERVICE.parse().expect("a name"), port()), Some(public), public);
        // On a disk that fails it stays as it was.
        journal.update(&record).await.ok();
    }
}
