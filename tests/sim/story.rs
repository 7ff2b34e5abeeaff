//! One story: callers create, stop, start and delete while agents, nodes, links, clocks, disks and
//! `pct` fail and controllers are replaced. Then all faults end, and the invariants are checked.

use std::{fmt, time::Duration};

use agent::pve::{
    ErrorKind,
    fake::{Fault, Membership, Op, Trouble},
};

use crate::{
    Broken, Mutant,
    access::{self, ORDERS},
    calls::{CameTo, Done, Known, MORTAL, Memory, Verb, acked, change, create},
    chance::Chance,
    check,
    cluster::Cluster,
    drains,
    lives::Knows,
    operator::{self, Seen},
};

/// Number of moves in a story.
const MOVES: u64 = 36;

/// Operations of callers on a sandbox; repeated ones are more frequent.
const VERBS: [Verb; 12] = [
    Verb::Delete,
    Verb::Delete,
    Verb::Pause,
    Verb::Stop,
    Verb::Start,
    Verb::Pause,
    Verb::PauseOrStop,
    Verb::Resume,
    Verb::Exec,
    Verb::Extend,
    Verb::Grow,
    Verb::Shrink,
];

/// Counts of the events in a story.
#[derive(Debug, Default)]
pub struct Told {
    created: u64,
    deleted: u64,
    crashes: u64,
    faults: u64,
    /// Actions of an operator on the host.
    meddled: u64,
    /// Faults of a host's network, disk, speed or clock.
    worsened: u64,
    /// Controllers that replaced one that was not told.
    taken_over: u64,
    /// Replays of what an earlier controller had sent.
    haunted: u64,
    /// Sandboxes that moved to another node.
    moved: u64,
    /// Changes of who reaches a sandbox, or of what it reaches.
    opened: u64,
    unknown: u64,
}

impl Told {
    /// Returns whether every kind of event happened.
    pub fn is_busy(&self) -> bool {
        let Self {
            created,
            deleted,
            crashes,
            faults,
            meddled,
            worsened,
            taken_over,
            haunted,
            moved,
            opened,
            unknown: _,
        } = self;
        [created, deleted, crashes, faults, meddled, worsened, taken_over, haunted, moved, opened]
            .into_iter()
            .all(|count| *count > 0)
    }

    /// Adds the counts of another story.
    pub fn add(&mut self, other: &Told) {
        self.created += other.created;
        self.deleted += other.deleted;
        self.crashes += other.crashes;
        self.faults += other.faults;
        self.meddled += other.meddled;
        self.worsened += other.worsened;
        self.taken_over += other.taken_over;
        self.haunted += other.haunted;
        self.moved += other.moved;
        self.opened += other.opened;
        self.unknown += other.unknown;
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            created,
            deleted,
            crashes,
            faults,
            meddled,
            worsened,
            taken_over,
            haunted,
            moved,
            opened,
            unknown,
        } = self;
        write!(
            f,
            "{created} created, {deleted} deleted, {crashes} crashes, {faults} faults of pct, \
             {meddled} times an operator, {worsened} times a network, disk or clock, \
             {taken_over} times another controller, {haunted} times its words again, \
             {moved} moved, {opened} times a port or egress opened or closed, \
             {unknown} calls without an answer"
        )
    }
}

/// Runs the story of a seed and checks its end.
pub(crate) async fn tell(seed: u64, mutant: Option<&Mutant>) -> Result<Told, Broken> {
    let cluster = Cluster::new(seed, mutant).await;
    let mut story = Story {
        chance: Chance::new(seed, 1),
        // Of its own, so that the other moves stay what they are.
        access_chance: Chance::new(seed, 2),
        cluster,
        told: Told::default(),
        memory: Memory::new(),
        seen: Seen::default(),
        calls: tokio::task::JoinSet::new(),
        accesses: tokio::task::JoinSet::new(),
        drains: tokio::task::JoinSet::new(),
    };
    for step in 0..MOVES {
        story.cluster.ease(&story.chance);
        Box::pin(story.step(step)).await;
        story.change_access();
        story.pause(4000).await;
        story.cluster.start_the_dead().await;
        story.seen.look(&story.cluster);
        story.cluster.look(&story.memory).await;
        if !story.cluster.watch.seen().is_empty() {
            return Err(Broken(story.cluster.watch.seen()));
        }
        story.drain();
    }
    let Story { mut cluster, mut told, mut memory, mut calls, mut accesses, mut drains, .. } =
        story;
    cluster.calm();
    cluster.start_the_dead().await;
    cluster.pve.release();
    while let Some(done) = calls.join_next().await {
        note(&mut told, &mut memory, done.expect("a caller does not panic"));
    }
    while let Some(answer) = accesses.join_next().await {
        note_access(&mut told, &mut memory, answer.expect("a caller does not panic"));
    }
    while let Some(moved) = drains.join_next().await {
        told.moved += moved.expect("a drain does not panic") as u64;
    }
    check::settles(&mut cluster, &memory).await.map_err(Broken)?;
    Ok(told)
}

struct Story {
    chance: Chance,
    access_chance: Chance,
    cluster: Cluster,
    told: Told,
    memory: Memory,
    seen: Seen,
    calls: tokio::task::JoinSet<Done>,
    accesses: tokio::task::JoinSet<Option<access::Answer>>,
    drains: tokio::task::JoinSet<usize>,
}

impl Story {
    async fn step(&mut self, step: u64) {
        match self.chance.below(100) {
            0..37 => self.create(step),
            37..56 => {
                let verb = *self.chance.pick(&VERBS).expect("there are some");
                if let Some((key, id)) = self.somebody(verb) {
                    self.change(key, id, verb);
                }
            }
            56..64 => {
                self.cluster.pve.inject(fault(&self.chance));
                self.told.faults += 1;
            }
            64..71 => self.kill().await,
            71..75 => self.cut().await,
            75..78 => self.flap().await,
            78..80 => {
                self.cluster.restart_controller().await;
                self.told.crashes += 1;
            }
            80..83 => self.import().await,
            83..85 => {
                let host = self.chance.pick(&self.cluster.hosts).expect("there are some");
                let now = self.cluster.controller();
                let heard =
                    host.agent().is_some_and(|agent| agent.sandboxes().epoch() >= now.epoch());
                self.told.haunted += u64::from(self.cluster.net.haunt(&host.name, now.number));
                // A node that has not heard of the controller obeys the one before once more.
                if !heard {
                    self.memory.values_mut().for_each(|known| known.access.forget());
                }
            }
            85..92 => {
                self.cluster.worsen(&self.chance);
                self.told.worsened += 1;
                // Sometimes longer than a creation waits for its node.
                self.pause(if self.chance.percent(15) { 120_000 } else { 10_000 }).await;
            }
            92..93 if self.chance.percent(50) => self.allocate().await,
            92..93 => {
                // An operator takes the vmid that a creation was given, or the next one.
                if let Some((node, vmid)) = operator::coveted(&self.cluster, &self.chance).await {
                    let mut hosts = self.cluster.hosts.iter();
                    let index = hosts.position(|host| host.name == node);
                    self.cluster.add_somebodys(index.expect("a host"), vmid, None);
                    self.told.meddled += 1;
                }
            }
            93..95 => self.meddle().await,
            95..97 => self.cluster.back_up(),
            97..99 => self.drain_a_node().await,
            _ if self.chance.percent(50) => self.lose_corosync().await,
            _ => {
                self.cluster.pve.set_quorate(false);
                self.pause(15_000).await;
                self.cluster.pve.set_quorate(true);
            }
        }
    }

    async fn pause(&self, ms_max: u64) {
        tokio::time::sleep(Duration::from_millis(self.chance.below(ms_max))).await;
    }

    fn create(&mut self, step: u64) {
        // Sometimes repeats a request, as a caller does that got no answer.
        let key = match self.chance.pick(&self.memory.keys().cloned().collect::<Vec<_>>()) {
            Some(key) if self.chance.percent(20) => key.clone(),
            _ if self.chance.percent(20) => format!("{MORTAL}{step}"),
            _ => format!("r{step}"),
        };
        let new = !self.memory.contains_key(&key);
        self.memory.entry(key.clone()).or_default().calls += 1;
        let life = self.cluster.called(&self.chance);
        self.calls.spawn(create(&self.cluster, life, key, new));
    }

    /// Returns a sandbox to which the verb applies.
    fn somebody(&self, verb: Verb) -> Option<(String, String)> {
        let mut acked = acked(&self.memory);
        acked.retain(|(key, _)| verb != Verb::Extend || key.starts_with(MORTAL));
        self.chance.pick(&acked).cloned()
    }

    fn change(&mut self, key: String, id: String, verb: Verb) {
        self.cluster.rebooted.remove(&id);
        let life = self.cluster.called(&self.chance);
        let known = self.memory.get_mut(&key).expect("known");
        known.calls += 1;
        // A request to a replaced controller must change nothing.
        if !life.replaced {
            known.asked(verb);
        }
        self.calls.spawn(change(&self.cluster, life, key, id, verb));
    }

    /// Mostly changes who reaches a sandbox, or what it reaches.
    fn change_access(&mut self) {
        self.drain_accesses();
        let chance = &self.access_chance;
        if chance.percent(30) {
            return;
        }
        let Some((key, id)) = chance.pick(&acked(&self.memory)).cloned() else { return };
        let order = *chance.pick(&ORDERS).expect("there are some");
        let life = self.cluster.called(chance);
        if chance.percent(10) {
            self.accesses.spawn(access::trespass(&self.cluster, life, id, order));
            return;
        }
        self.memory.get_mut(&key).expect("known").access.asked(order);
        self.accesses.spawn(access::change(&self.cluster, life, key, id, order));
    }

    fn drain_accesses(&mut self) {
        while let Some(answer) = self.accesses.try_join_next() {
            let answer = answer.expect("a caller does not panic");
            note_access(&mut self.told, &mut self.memory, answer);
        }
    }

    fn host(&self) -> usize {
        usize::try_from(self.chance.below(3)).expect("an index")
    }

    async fn kill(&mut self) {
        let index = self.host();
        if self.chance.percent(30) {
            // Answers from before the power cut are recorded before it.
            self.drain();
            self.cluster.power_cut(index).await;
            self.memory.values_mut().for_each(Known::shaken);
            // Earlier requests without an answer may still be carried out.
            let asked = self.memory.values().filter(|known| known.calls > 0 || known.is_murky());
            for id in asked.filter_map(|known| known.id.as_ref()) {
                self.cluster.rebooted.remove(id);
            }
            self.seen.bring_back(&self.cluster, index, &self.chance).await;
        } else {
            self.cluster.kill_agent(index).await;
        }
        self.told.crashes += 1;
        self.pause(3000).await;
        self.cluster.start_the_dead().await;
    }

    /// Restarts a node's pmxcfs while its corosync is down; callers delete and create meanwhile,
    /// and the node's agent may restart as well.
    async fn lose_corosync(&mut self) {
        let index = self.host();
        let name = self.cluster.hosts[index].name.clone();
        self.cluster.pve.set_membership(&name, Membership::Unheard);
        if self.chance.percent(30) {
            self.cluster.kill_agent(index).await;
            self.cluster.start_the_dead().await;
        }
        for _ in 0..3 {
            if let Some((key, id)) = self.somebody(Verb::Delete) {
                self.change(key, id, Verb::Delete);
            }
        }
        self.pause(15_000).await;
        self.cluster.look(&self.memory).await;
        self.cluster.pve.set_membership(&name, Membership::Member);
    }

    /// Drains a node with stopped sandboxes; meanwhile a daemon mostly restarts or is cut off.
    async fn drain_a_node(&mut self) {
        for _ in 0..3 {
            if let Some((key, id)) = self.somebody(Verb::Stop) {
                self.change(key, id, Verb::Stop);
            }
        }
        self.pause(6000).await;
        let node = drains::fullest(&self.cluster).await;
        let pause = Duration::from_millis(self.chance.below(30_000));
        self.drains.spawn(drains::drain(&self.cluster, node, pause));
        self.pause(500).await;
        match self.chance.below(8) {
            0..2 => self.kill().await,
            2..4 => self.flap().await,
            4 => {
                self.cluster.restart_controller().await;
                self.told.crashes += 1;
            }
            5 => self.import().await,
            _ => {}
        }
    }

    async fn cut(&mut self) {
        let name = self.cluster.hosts[self.host()].name.clone();
        self.cluster.net.set_reachable(&name, false);
        // Sometimes longer than a creation waits for its node.
        self.pause(if self.chance.percent(25) { 120_000 } else { 20_000 }).await;
        self.cluster.net.set_reachable(&name, true);
    }

    /// Cuts and reconnects a link several times.
    async fn flap(&mut self) {
        let name = self.cluster.hosts[self.host()].name.clone();
        for _ in 0..3 + self.chance.below(6) {
            self.cluster.net.set_reachable(&name, false);
            self.pause(400).await;
            self.cluster.net.set_reachable(&name, true);
            self.pause(1500).await;
        }
    }

    async fn import(&mut self) {
        let knows = match self.chance.below(10) {
            0..6 => Knows::All,
            6..8 => Knows::Backup,
            _ => Knows::Nothing,
        };
        // A controller that knows less than the nodes must be able to hear all of them: nobody can
        // tell what was created on a node that is away.
        if knows == Knows::All || self.cluster.is_whole() {
            let lives_on = self.chance.percent(60);
            self.cluster.import(knows, lives_on).await;
            self.told.taken_over += 1;
        }
    }

    /// Replaces a sandbox's container with a foreign one for a while.
    async fn meddle(&mut self) {
        let verbs = [Verb::Delete, Verb::Start, Verb::Exec];
        let verb = *self.chance.pick(&verbs).expect("there are some");
        let Some((key, id)) = self.somebody(verb) else { return };
        if let Some(record) = operator::quiet(&self.cluster, &id).await
            && let Some(was) = self.cluster.take_out(record.vmid)
        {
            self.change(key, id, verb);
            self.told.meddled += 1;
            self.pause(15_000).await;
            self.cluster.look(&self.memory).await;
            self.cluster.put_back(record.vmid, was).await;
        }
    }

    /// Allocates a foreign volume: under the vmid of the next creation, which then mostly fails, or
    /// under that of an existing sandbox, which is deleted then, or lives on.
    async fn allocate(&mut self) {
        if self.chance.percent(50) {
            if let Some((node, vmid)) = operator::next(&self.cluster, &self.chance).await {
                self.cluster.allocate(&node, vmid);
                self.told.meddled += 1;
                let trouble = Trouble::Killed;
                self.cluster.pve.inject(Fault {
                    op: Op::Clone,
                    node: None,
                    vmid: Some(vmid),
                    trouble,
                });
            }
            return;
        }
        let Some((key, id)) = self.somebody(Verb::Delete) else { return };
        if let Some(record) = operator::quiet(&self.cluster, &id).await
            && let Some(guest) = self.cluster.pve.guests().get(&record.vmid)
        {
            self.cluster.allocate(&guest.node, record.vmid);
            self.told.meddled += 1;
            if self.chance.percent(50) {
                self.change(key, id, Verb::Delete);
            }
        }
    }

    fn drain(&mut self) {
        while let Some(done) = self.calls.try_join_next() {
            let done = done.expect("a caller does not panic");
            note(&mut self.told, &mut self.memory, done);
        }
    }
}

fn note(told: &mut Told, memory: &mut Memory, Done { key, came_to }: Done) {
    let known = memory.get_mut(&key).expect("known");
    match &came_to {
        CameTo::Created { running, .. } => told.created += u64::from(*running && !known.acked),
        CameTo::Deleted => told.deleted += 1,
        CameTo::Unknown => told.unknown += 1,
        CameTo::Paused | CameTo::Extended | CameTo::Changed | CameTo::Refused => {}
    }
    known.note(&key, came_to);
}

fn note_access(told: &mut Told, memory: &mut Memory, answer: Option<access::Answer>) {
    let Some(answer) = answer else { return };
    let known = memory.get_mut(&answer.key).expect("known");
    told.opened += u64::from(known.access.answered(&answer));
}

fn fault(chance: &Chance) -> Fault {
    let op = *chance
        .pick(&[
            Op::Clone,
            Op::Set,
            Op::Resize,
            Op::Start,
            Op::Stop,
            Op::Destroy,
            Op::PauseLock,
            Op::PauseUnlock,
            Op::Freeze,
            Op::Thaw,
        ])
        .expect("there are some");
    let failed = || ErrorKind::Failed("simulated".into());
    let trouble = match chance.below(6) {
        0 => Trouble::Before(failed()),
        1 => Trouble::After(failed()),
        2 => Trouble::Killed,
        3 => Trouble::KilledAtOnce,
        4 => Trouble::RolledBack,
        _ => Trouble::Hangs,
    };
    Fault { op, node: None, vmid: None, trouble }
}
