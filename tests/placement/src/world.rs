//! One run: time, messages in transit, and the placement of requests.

use std::{cmp::Ordering, collections::BinaryHeap};

use controller::placement::Look;

use crate::{
    host::{Begun, Host, Report},
    measure::{Measured, Measures},
    ours::Ours,
    peers::{self, Peer, Question},
    scenario::{self, Request, Scenario, WARM_UP_S},
    stream::{self, Stream},
    view::Seen,
};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Algorithm {
    /// A published algorithm.
    Peer(Peer),
    /// The product's algorithm.
    Ours {
        /// Number of nodes to look at.
        look: Look,
        /// Whether the best three are asked for a fresh report and a reservation before the choice.
        probes: bool,
        /// Whether a team's sandboxes are spread.
        spread: bool,
    },
}

/// Most attempts for one request.
const ATTEMPTS_MAX: usize = 3;
/// Longest wait for a node's answer, seconds.
const TIME_OUT_S: f64 = 5.0;
/// Longest wait of a caller for its sandbox, seconds.
const PATIENCE_S: f64 = 20.0;
/// Lifetime of a reservation on a node that was asked before the choice, seconds.
const PROMISE_S: f64 = 2.0;

#[derive(Debug)]
enum Controller {
    Ours(Box<Ours>),
    Peer { peer: Peer, seen: Vec<Seen>, random: Stream, cursor: usize, usable: Vec<usize> },
}

#[derive(Debug)]
enum Event {
    Tick,
    Decide { id: usize },
    Arrives { id: usize, node: usize },
    Answer { id: usize, node: usize, taken: bool, at: f64, report: Report },
    TimeOut { id: usize, node: usize },
    Started { id: usize, node: usize },
    Send { node: usize },
    Report { node: usize, controller: usize, report: Report },
}

#[derive(Debug)]
struct Due {
    at: f64,
    number: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Orders the heap, which returns the largest: the earliest event, and among equals the oldest.
impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.number.cmp(&self.number))
    }
}

struct World<'a> {
    scenario: &'a Scenario,
    seed: u64,
    requests: Vec<Request>,
    tried: Vec<Vec<usize>>,
    on: Vec<Option<usize>>,
    hosts: Vec<Host>,
    controllers: Vec<Controller>,
    probes: bool,
    events: BinaryHeap<Due>,
    made: u64,
    network: Stream,
    service: Stream,
    measures: Measures,
}

/// Runs one algorithm through one variant and seed.
pub fn run(algorithm: Algorithm, scenario: &Scenario, seed: u64) -> Measured {
    let alone = matches!(algorithm, Algorithm::Peer(peer) if peer.decides_alone());
    let scenario =
        &Scenario { controllers: if alone { 1 } else { scenario.controllers }, ..*scenario };
    let drawn = scenario::draw(scenario, seed);
    let controllers = (0..scenario.controllers).map(|number| {
        let own = stream::CONTROLLERS + number as u64;
        match algorithm {
            Algorithm::Peer(peer) => {
                let mut random = Stream::new(seed, own);
                Controller::Peer {
                    peer,
                    seen: drawn.machines.iter().map(Seen::new).collect(),
                    cursor: random.below(drawn.machines.len()),
                    random,
                    usable: Vec::new(),
                }
            }
            Algorithm::Ours { look, spread, .. } => {
                let seed = Stream::new(seed, own).0.next();
                let ours = Ours::new(&drawn.machines, scenario, look, spread, seed);
                Controller::Ours(Box::new(ours))
            }
        }
    });
    let controllers = controllers.collect();
    let mut world = World {
        scenario,
        seed,
        tried: vec![Vec::new(); drawn.requests.len()],
        on: vec![None; drawn.requests.len()],
        requests: drawn.requests,
        hosts: drawn.machines.into_iter().map(Host::new).collect(),
        controllers,
        probes: matches!(algorithm, Algorithm::Ours { probes: true, .. }),
        events: BinaryHeap::new(),
        made: 0,
        network: Stream::new(seed, stream::NETWORK),
        service: Stream::new(seed, stream::SERVICE),
        measures: Measures::new(),
    };
    world.play();
    world.measures.sum_up()
}

impl World<'_> {
    fn push(&mut self, at: f64, event: Event) {
        self.made += 1;
        self.events.push(Due { at, number: self.made, event });
    }

    fn delay(&mut self) -> f64 {
        0.001 + self.network.exponential(0.004)
    }

    fn play(&mut self) {
        self.push(1.0, Event::Tick);
        for node in 0..self.hosts.len() {
            let first = self.network.uniform(0.0, self.scenario.period_s);
            self.push(first, Event::Send { node });
        }
        for id in 0..self.requests.len() {
            self.push(self.requests[id].at, Event::Decide { id });
        }
        let end = self.scenario.end_s();
        while let Some(Due { at: now, event, .. }) = self.events.pop() {
            // A sandbox that was requested in time may start after the end.
            if now > end + PATIENCE_S {
                break;
            }
            self.happen(now, event);
        }
    }

    fn happen(&mut self, now: f64, event: Event) {
        match event {
            Event::Tick => self.tick(now),
            Event::Decide { id } => self.decide(id, now),
            Event::Arrives { id, node } => self.arrive(id, node, now),
            Event::Answer { id, node, taken, at, report } => {
                self.answered(id, node, (taken, at), &report, now);
            }
            Event::TimeOut { id, node } => {
                let controller = self.requests[id].controller;
                match &mut self.controllers[controller] {
                    Controller::Ours(ours) => ours.timed_out(id, node, now),
                    Controller::Peer { seen, .. } => seen[node].release(id),
                }
                self.decided_wrongly(id, node);
                self.decide(id, now);
            }
            Event::Started { id, node } => {
                let waited = now - self.requests[id].at;
                let late = waited > PATIENCE_S;
                self.hosts[node].started(id, now, late);
                if late {
                    self.fail(id);
                    self.gone(id);
                } else if self.counts(id) {
                    self.measures.started(waited);
                }
                self.begin(node, now);
            }
            Event::Send { node } => self.send(node, now),
            Event::Report { node, controller, report } => self.hear(controller, node, &report, now),
        }
    }

    /// Returns whether the request came in the measured time.
    fn counts(&self, id: usize) -> bool {
        let at = self.requests[id].at;
        at >= f64::from(WARM_UP_S) && at < self.scenario.end_s()
    }

    fn fail(&mut self, id: usize) {
        if self.counts(id) {
            self.measures.failed();
        }
    }

    fn tick(&mut self, now: f64) {
        let measured = now > f64::from(WARM_UP_S) && now <= self.scenario.end_s();
        let (mut ended, mut killed) = (Vec::new(), Vec::new());
        for at in 0..self.hosts.len() {
            let second = self.hosts[at].tick(now, &mut ended, &mut killed);
            if measured {
                self.measures.second(&second);
            }
        }
        if measured {
            self.measures.end_of_second(killed.len());
        }
        for id in ended.into_iter().chain(killed) {
            self.gone(id);
        }
        self.push(now + 1.0, Event::Tick);
    }

    fn gone(&mut self, id: usize) {
        let (Some(node), Some(team)) = (self.on[id].take(), self.requests[id].burst) else {
            return;
        };
        for controller in &mut self.controllers {
            if let Controller::Ours(ours) = controller {
                ours.count_team(team, node, false);
            }
        }
    }

    fn decide(&mut self, id: usize, now: f64) {
        let request = self.requests[id];
        let first = self.tried[id].is_empty();
        if first && self.counts(id) {
            self.measures.asked();
        }
        if self.tried[id].len() >= ATTEMPTS_MAX {
            return self.fail(id);
        }
        let tried = std::mem::take(&mut self.tried[id]);
        let chosen = match &mut self.controllers[request.controller] {
            Controller::Peer { peer, seen, random, cursor, usable } => {
                let mut question = Question {
                    seen,
                    request: &request,
                    tried: &tried,
                    now,
                    random,
                    cursor,
                    usable,
                };
                let chosen = peers::choose(*peer, &mut question);
                if let Some(node) = chosen.filter(|_| peer.counts_its_own()) {
                    seen[node].reserve(id, &request);
                }
                chosen
            }
            Controller::Ours(ours) => {
                let best = ours.best(&request, &tried, now);
                if self.probes { self.probe(id, &best, now) } else { best.first().copied() }
            }
        };
        self.tried[id] = tried;
        let Some(node) = chosen else { return self.fail(id) };
        if let Controller::Ours(ours) = &mut self.controllers[request.controller] {
            if !self.probes {
                ours.decided(id, &request, node, now);
            }
            if let Some(team) = request.burst {
                ours.count_team(team, node, true);
            }
        }
        self.tried[id].push(node);
        let delay = self.delay();
        self.push(now + delay, Event::Arrives { id, node });
    }

    /// Asks the best nodes for a fresh report and a reservation, and takes the best of the answers.
    fn probe(&mut self, id: usize, best: &[usize], now: f64) -> Option<usize> {
        let request = self.requests[id];
        let Controller::Ours(ours) = &mut self.controllers[request.controller] else { return None };
        let mut answered = Vec::new();
        for &node in best {
            if !self.hosts[node].machine.unreachable.holds(now) {
                let report = self.hosts[node].report(now);
                ours.reported(node, &report, now);
                answered.push(node);
            }
        }
        let chosen =
            ours.best_probed(&request, &answered, now).or_else(|| best.first().copied())?;
        ours.decided(id, &request, chosen, now);
        if answered.contains(&chosen) {
            self.hosts[chosen].promised.push((id, now + PROMISE_S, request));
            let seq = self.hosts[chosen].report(now).seq;
            ours.admitted(id, chosen, seq);
        }
        Some(chosen)
    }

    fn arrive(&mut self, id: usize, node: usize, now: f64) {
        if self.hosts[node].machine.unreachable.holds(now) {
            return self.push(now + TIME_OUT_S, Event::TimeOut { id, node });
        }
        let request = self.requests[id];
        let taken = self.hosts[node].admit(id, &request, self.seed);
        if taken {
            self.on[id] = Some(node);
            if self.counts(id) {
                self.measures.placed(request.burst, node, self.hosts[node].is_slow(now));
            }
            if let Some(team) = request.burst {
                for (at, controller) in self.controllers.iter_mut().enumerate() {
                    if let Controller::Ours(ours) = controller
                        && at != request.controller
                    {
                        ours.count_team(team, node, true);
                    }
                }
            }
            self.begin(node, now);
        } else if self.counts(id) {
            self.measures.refused();
        }
        let report = self.hosts[node].report(now);
        let delay = self.delay();
        self.push(now + delay, Event::Answer { id, node, taken, at: now, report });
    }

    fn answered(
        &mut self,
        id: usize,
        node: usize,
        (taken, at): (bool, f64),
        report: &Report,
        now: f64,
    ) {
        match &mut self.controllers[self.requests[id].controller] {
            // Every answer carries a report.
            Controller::Ours(ours) => {
                if taken {
                    ours.admitted(id, node, report.seq);
                } else {
                    ours.refused(id, node);
                }
                ours.reported(node, report, now);
            }
            Controller::Peer { seen, .. } => {
                if taken {
                    seen[node].admitted(id, at);
                } else {
                    seen[node].release(id);
                }
            }
        }
        if !taken {
            self.decided_wrongly(id, node);
            self.decide(id, now);
        }
    }

    /// Corrects the team's count: the sandbox did not start on the chosen node.
    fn decided_wrongly(&mut self, id: usize, node: usize) {
        let Request { controller, burst, .. } = self.requests[id];
        if let (Controller::Ours(ours), Some(team)) = (&mut self.controllers[controller], burst) {
            ours.count_team(team, node, false);
        }
    }

    fn begin(&mut self, node: usize, now: f64) {
        while let Some(Begun { id, takes_s }) = self.hosts[node].begin(now, &mut self.service) {
            self.push(now + takes_s, Event::Started { id, node });
        }
    }

    fn send(&mut self, node: usize, now: f64) {
        let period = self.scenario.period_s;
        let gap = self.network.uniform(period / 3.0, period * 5.0 / 3.0);
        self.push(now + gap, Event::Send { node });
        let report = self.hosts[node].report(now);
        let machine = &self.hosts[node].machine;
        let unheard = machine.silent.holds(now) || machine.unreachable.holds(now);
        for controller in 0..self.controllers.len() {
            let lost = self.network.unit() < 0.05;
            let delay = self.delay();
            if !lost && !unheard {
                self.push(now + delay, Event::Report { node, controller, report });
            }
        }
    }

    fn hear(&mut self, controller: usize, node: usize, report: &Report, now: f64) {
        match &mut self.controllers[controller] {
            Controller::Ours(ours) => ours.reported(node, report, now),
            Controller::Peer { seen, .. } => seen[node].reported(*report, now),
        }
    }
}
