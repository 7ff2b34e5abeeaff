//! Creating a sandbox. Read `make`, then `steps`, top to bottom.
//!
//! | step | undo |
//! |---|---|
//! | admit, under the admission lock | the guard drops |
//! | `begin`: intent in the journal, with a vmid and an address | the record ends as FAILED |
//! | clone (`clone.rs`), in the template's queue | `destroy_clone`: the container and the volumes that are its own |
//! | configure, grow the disk, start, probe | the same |
//! | RUNNING in the journal | none: from here on `delete` |
//!
//! After a crash the reconciler runs `undo`, which is the same `destroy_clone`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxRef, Vmid},
    name::Team,
    sandbox::v1::StopResult,
    spec::{Egress, Network, Size},
    visibility::Visibility,
};
use tokio::time::Instant;

use super::{boot, default_services};
use crate::{
    journal::{Access, Intent, Lifetime, Phase, Record, WakeOn},
    pve::{Address, Cluster, OwnVolumes, Settings, StorageRoom, ownership},
    saga::Saga,
    sandbox::{
        Error, Event, Order, Result, Sandboxes, Template,
        admission::{
            decide::{Facts, Memory, Recall, Summary, decide, recall},
            lock::{AdmissionGuard, CountGuard},
        },
        core::{
            deadline,
            operations::{Entry, OperationContext, OperationGuard, OperationHandle, OperationKind},
        },
    },
};

/// Longest wait for the intent to be durable, for a caller that asked for no wait.
const RECORD: Duration = Duration::from_secs(20);

/// Admitted creation, with what its steps need.
pub(super) struct Work<'a> {
    order: &'a Order,
    template: &'a Template,
    context: &'a OperationContext,
    pub(super) deadline: Instant,
}

/// Result of admission.
enum Admitted {
    /// New sandbox, to be created by this call.
    New(Box<(OperationGuard, CountGuard, OperationHandle, Template)>),
    /// Creation that is under way.
    Joined(OperationHandle),
    /// Sandbox that was created before.
    Made(SandboxRef),
}

impl Sandboxes {
    /// Creates a sandbox, or refuses it: admits the order, then works on its own task. Returns when
    /// the sandbox runs, when the creation has failed and is rolled back, or after `wait` with the
    /// record as it is then. The same order again returns the same sandbox.
    ///
    /// # Errors
    /// When the order is refused, or when not even the intent could be recorded. A creation that
    /// fails later returns no error but a record with its failure.
    pub async fn create(self: &Arc<Self>, order: Order, wait: Duration) -> Result<Arc<Record>> {
        let until = Instant::now() + wait;
        let mut operation = match self.admit(&order).await? {
            Admitted::Made(name) => return self.get(&name).await,
            Admitted::Joined(operation) => operation,
            Admitted::New(new) => {
                let (guard, counted, operation, template) = *new;
                self.run(guard, |sandboxes, context| async move {
                    sandboxes.make(&order, &template, &context, counted).await
                });
                operation
            }
        };
        operation.recorded(RECORD).await;
        self.outcome(operation, until.saturating_duration_since(Instant::now())).await
    }

    async fn admit(&self, order: &Order) -> Result<Admitted> {
        let template = self.template(&order.spec.snapshot).await;
        let cluster = self.pve.cluster().await;
        // Before anything is leased from ranges that depend on the number.
        if let Err(error) = self.note_number(&cluster).await {
            // Then an intent cannot be written either; known sandboxes are still answered.
            tracing::warn!(%error, "the node's number was not written");
        }
        let (room, fit) = match &template {
            Ok(template) => {
                let room = self.pve.storage_room(template.vmid).await.map_err(Error::from);
                (room, self.check_template(template).await)
            }
            Err(error) => (Err(error.clone()), Ok(())),
        };
        // From here on no other creation is admitted, and nothing waits.
        let admission = self.admission.lock(&order.id);
        let name = SandboxRef::Id(order.id);
        let by_id = admission.by_id(&order.id).or_else(|| self.known(&name).map(Summary::from));
        let request = (&order.team, &order.spec.request_id);
        let by_request = admission
            .by_request(request.0, request.1)
            .or_else(|| self.records.index.by_request(request.0, request.1).map(Summary::from));
        // A known sandbox is answered even when nothing new could be created.
        if let Recall::Same(id) = recall(order, by_id, by_request)? {
            return Ok(match self.operations.find(&id, OperationKind::Create) {
                Some(operation) => Admitted::Joined(operation),
                None => Admitted::Made(SandboxRef::Id(id)),
            });
        }
        let template = template?;
        fit?;
        self.check_isolation_works()?;
        self.check_resolver(order.spec.egress.as_ref().unwrap_or(&Egress::Open))?;
        if self.network_of(order.spec.network)? == Network::Dhcp {
            let bridge = template.bridge.as_deref().unwrap_or(&self.options.network.name);
            self.check_dhcp_bridge(bridge)?;
        }
        let size = order.spec.size.or(template.size);
        let facts = self.facts(&admission, &template, size, Some(&order.team), (&cluster, room?));
        decide(&facts, &self.options.limits)?;
        Ok(match self.operations.enter(order.id, OperationKind::Create) {
            Entry::Joined(operation) => Admitted::Joined(operation),
            Entry::New(guard, operation) => {
                let counted = admission.admit(order, size.memory_bytes(), template.vmid);
                Admitted::New(Box::new((guard, counted, operation, template)))
            }
        })
    }

    /// Collects the facts that a creation of this size is admitted on, under the admission lock. The team of a
    /// reservation is not known.
    pub(in crate::sandbox) fn facts(
        &self,
        admitted: &AdmissionGuard<'_>,
        template: &Template,
        size: Size,
        team: Option<&Team>,
        (cluster, room): (&Cluster, StorageRoom),
    ) -> Facts {
        Facts {
            memory: self.host().map(|host| Memory {
                asked: size.memory_bytes(),
                given: self.memory_given() + admitted.memory(),
                total: host.memory_total,
                available: host.memory_available,
            }),
            stopping: self.tasks.stopping().is_cancelled(),
            scheduling: self.scheduling().state,
            quorate: cluster.quorate,
            renumbered: self.renumbered(cluster),
            room,
            queued: admitted.queued(template.vmid),
            queued_of_team: team.map(|team| admitted.queued_of(team, template.vmid)),
            start: admitted.start(),
        }
    }

    /// Refuses a snapshot whose template cannot be cloned, or whose clones would collide.
    pub(in crate::sandbox) async fn check_template(&self, template: &Template) -> Result<()> {
        // A missing template is reported by the next step that reads it.
        let Some(config) = self.pve.config(template.vmid).await? else { return Ok(()) };
        ownership::clonable(&config, template.vmid).map_err(|why| {
            let message = format!("snapshot {}: {why}", template.snapshot);
            Error::new(Reason::ContainerUnfit, message)
        })?;
        self.check_interfaces(template.vmid, &config)
    }

    async fn make(
        &self,
        order: &Order,
        template: &Template,
        context: &OperationContext,
        mut counted: CountGuard,
    ) -> Result<Arc<Record>> {
        let deadline = Instant::now() + self.options.limits.create;
        let _turn = context.turn(deadline).await?;
        let work = Work { order, template, context, deadline };
        let record = self.begin(&work).await?;
        context.recorded();
        let mut saga = Saga::new(&self.faults);
        match self.steps(&mut saga, &work, &mut counted, record).await {
            Ok(record) => Ok(record),
            Err(error) => self.give_up(saga, &order.id, error).await,
        }
    }

    /// Writes the intent, durable before anything is touched. Leases a vmid and an address with it.
    async fn begin(&self, work: &Work<'_>) -> Result<Arc<Record>> {
        let Order { id, team, attempt, body_digest, spec, port_rules } = work.order;
        // A later cancellation finds this operation; an earlier one is in the journal.
        if self.records.feed().cancelled(id).await? >= *attempt {
            return Err(cancelled(work));
        }
        self.unlock_before(id, work.deadline).await?;
        let (now_ms, since) = (self.now_ms(), self.clock.moment());
        let network = self.network_of(spec.network)?;
        let mut record = Record {
            adopted: false,
            moved_to: None,
            id: *id,
            vmid: work.template.vmid,
            template: work.template.vmid,
            team: team.clone(),
            request_id: spec.request_id.clone(),
            body_digest: body_digest.clone(),
            attempt: *attempt,
            phase: Phase::Creating,
            progress: Progress::Queued,
            snapshot: spec.snapshot.clone(),
            size: spec.size.or(work.template.size),
            resizing: None,
            disk_unfinished: false,
            network,
            ip: None,
            ip_granted: false,
            further_ips: Vec::new(),
            egress: spec.egress.clone().unwrap_or_default(),
            services: BTreeMap::new(),
            access: Access::default(),
            name: spec.name.clone(),
            metadata: spec.metadata.clone(),
            env: spec.env.clone(),
            env_lost: false,
            boot: 0,
            created_ms: now_ms,
            started_ms: 0,
            ended_ms: 0,
            wake_on: WakeOn::default(),
            lifetime: Lifetime::default()
                .with(&self.options.lifetimes.default, &since)
                .with(&spec.lifetime, &since),
            since,
            cause: Cause::ASKED,
            init: None,
            halt_by: None,
            stop_result: StopResult::Unspecified,
            volumes: OwnVolumes::default(),
            failure: None,
            revision: 0,
        };
        for (name, port) in &spec.services {
            // An older controller says nothing: to it every open port is public.
            let visibility = spec.visibility.get(port).copied();
            record.open((name.clone(), *port), visibility, Visibility::Public);
        }
        if let Some(rules) = port_rules {
            default_services::apply(&mut record, &work.template.ports, spec, rules);
        }
        let taken = self.pve.cluster().await.guests.into_keys().collect();
        let taken_ips = self.taken_addresses().await;
        let lease_address = network == Network::Static;
        let intent = Intent { record, lease_address, taken, taken_ips };
        let record = self.records.begin(intent, now_ms).await?;
        tracing::info!(sandbox_id = %id, vmid = %record.vmid, attempt, "creation recorded");
        Ok(record)
    }

    async fn steps<'a>(
        &'a self,
        saga: &mut Saga<'a, Error>,
        work: &Work<'_>,
        counted: &mut CountGuard,
        record: Arc<Record>,
    ) -> Result<Arc<Record>> {
        let id = record.id;
        // PVE locks a template during a clone and fails a second clone at once.
        let team = &work.order.team;
        let turn = self.queues.turn(work.template.vmid, Some(team), work.deadline);
        let turn = self.unless_cancelled(work, turn).await?;
        counted.start();
        let record = self.clone_under_a_free_vmid(saga, work, record).await?;
        drop(turn);

        check_cancelled(work)?;
        let volumes = self.named_volumes(&record).await?;
        let settings = self.settings(&record);
        saga.step_without_undo(Progress::Configure.name(), || async {
            let configured = self.pve.configure(record.vmid, &settings);
            let (configured, ()) = tokio::join!(configured, self.note_cloned(&id, &volumes));
            configured.map_err(Error::from)
        })
        .await?;
        let grows = self.grows_running(&record).await?;
        if !grows {
            self.grow_disk(saga, work, &record, Progress::ResizeOffline).await?;
        }

        // Booting is what costs the node most: a few at a time come up sooner than all at once.
        let slot = self.unless_cancelled(work, self.start_slot(team, work.deadline)).await?;
        let boot = boot::Boot {
            record: &record,
            begun: Instant::now(),
            probe: &work.template.probe,
            deadline: work.deadline,
        };
        let since = Instant::now();
        saga.step_without_undo(Progress::Start.name(), || async {
            let (started, ()) =
                tokio::join!(self.start_container(&boot), self.note(&id, Progress::Start));
            started
        })
        .await?;
        let boots = async {
            if grows {
                self.grow_disk(saga, work, &record, Progress::Resize).await?;
            }
            let disk_gib = self.disk_gib(&record).await?;
            saga.step_without_undo(Progress::Probe.name(), || async {
                let answers = self.unless_cancelled(work, self.until_it_answers(&boot));
                let (answer, ()) = tokio::join!(answers, self.note(&id, Progress::Probe));
                answer
            })
            .await?;
            Ok::<_, Error>(disk_gib)
        };
        let disk_gib = boot::in_slot(slot, boots).await?;
        self.admission.note_start(since.elapsed());

        check_cancelled(work)?;
        let init = self.pve.init(record.vmid).await.map(|init| init.start);
        self.advance(&id, Event::CameUp, |record| {
            record.boot += 1;
            record.init = init;
            record.started_ms = self.now_ms();
            record.size.disk_gib = disk_gib;
            record.volumes.clone_from(&volumes);
            record.progress = Progress::Done;
        })
        .await
    }

    /// True when the disk can grow while the sandbox runs, which takes a second; otherwise it grows
    /// before the start, which takes half a minute.
    async fn grows_running(&self, record: &Record) -> Result<bool> {
        let config = self.pve.config(record.vmid).await?;
        Ok(config.is_none_or(|config| config.grows_running()))
    }

    /// Grows the disk to the requested size. If that fails the creation fails: nobody gets a
    /// smaller disk than the answer says.
    async fn grow_disk<'a>(
        &'a self,
        saga: &mut Saga<'a, Error>,
        work: &Work<'_>,
        record: &Record,
        step: Progress,
    ) -> Result<()> {
        let Record { id, vmid, size: Size { disk_gib, .. }, .. } = *record;
        if disk_gib == 0 {
            return Ok(());
        }
        check_cancelled(work)?;
        saga.step_without_undo(step.name(), || async {
            let left = deadline::left(work.deadline, self.options.limits.create)?;
            let resized = self.pve.resize(vmid, disk_gib, left);
            let (resized, ()) = tokio::join!(resized, self.note(&id, step));
            resized.map_err(Error::from)
        })
        .await
    }

    /// Size of the disk, GiB: a snapshot's may be larger than requested. 0 when none was requested.
    async fn disk_gib(&self, record: &Record) -> Result<u32> {
        let asked = record.size.disk_gib;
        if asked == 0 {
            return Ok(0);
        }
        let config = self.pve.config(record.vmid).await?;
        Ok(config.map_or(asked, |config| config.rootfs_gib()))
    }

    pub(in crate::sandbox) fn settings(&self, record: &Record) -> Settings {
        let bridge = &self.options.network;
        let address = match (record.network, record.ip) {
            (Network::Static, Some(ip)) => {
                Address::Static { ip, prefix: bridge.prefix, gateway: bridge.gateway }
            }
            (Network::Static | Network::Dhcp, _) => Address::Dhcp,
        };
        // A template has another vmid on each node, so a moved sandbox is matched by its snapshot.
        let templates = &self.options.templates;
        let template = templates.iter().find(|template| template.vmid == record.template);
        let template = template
            .filter(|template| template.snapshot == record.snapshot)
            .or_else(|| templates.iter().find(|template| template.snapshot == record.snapshot));
        let named = template.and_then(|template| template.bridge.as_ref());
        Settings {
            bridge: named.unwrap_or(&bridge.name).clone(),
            link: template.map(|template| template.link.clone()).unwrap_or_default(),
            mac: mac(&address, record.vmid),
            address,
            cores: record.size.cpu_cores,
            memory_mib: record.size.memory_mib,
        }
    }

    /// Waits, unless the creation is cancelled first.
    pub(super) async fn unless_cancelled<T>(
        &self,
        work: &Work<'_>,
        wait: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            () = work.context.cancelled().cancelled() => Err(cancelled(work)),
            done = wait => done,
        }
    }
}

/// Computes a locally administered MAC. A leased address keeps one MAC for ever, so that no
/// neighbour's cache is wrong when it is used again; with DHCP the vmid determines the MAC.
fn mac(address: &Address, vmid: Vmid) -> [u8; 6] {
    let (kind, [a, b, c, d]) = match address {
        Address::Static { ip, .. } => (0x50, ip.octets()),
        Address::Dhcp => (0x51, vmid.get().to_be_bytes()),
    };
    [0x02, kind, a, b, c, d]
}

pub(super) fn check_cancelled(work: &Work<'_>) -> Result<()> {
    if work.context.cancelled().is_cancelled() { Err(cancelled(work)) } else { Ok(()) }
}

fn cancelled(work: &Work<'_>) -> Error {
    let Order { id, attempt, .. } = work.order;
    Error::new(Reason::CreateCancelled, format!("attempt {attempt} of {id} was cancelled"))
}
