//! The loop that keeps services running: one thread that waits for the end of a child, an order, a
//! READY=1 or a deadline, whichever comes first.
//!
//! One thread, because a bound service dies with the *thread* that started it, and because two
//! threads must never reap the same child.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::order::{Answer, Order};
use super::service::{Restart, Service, State, Status, check, load, save};
use super::spawn::{Surroundings, spawn};
use crate::wire;

const KILL_AFTER_TERM: Duration = Duration::from_secs(10);
const DELAY_MIN: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);
/// Run time after which a service restarts without a longer delay.
const LONG_ENOUGH: Duration = Duration::from_secs(10);
const WAITERS_MAX: usize = 256;
const IDLE: Duration = Duration::from_secs(60);

/// Paths and options of a supervisor.
#[derive(Debug, Clone)]
pub struct Place {
    /// Socket for orders; the sockets for READY=1 are created beside it.
    pub socket: PathBuf,
    /// File with the list of services.
    pub services: PathBuf,
    /// Cgroup below which each service has its own.
    pub slice: Option<PathBuf>,
    /// The same in the hierarchy that shares out the CPUs, for services that have a weight there.
    pub cpu_slice: Option<PathBuf>,
    /// Whether services die with the supervisor. An init does not need this: the kernel does it.
    pub bound: bool,
}

#[derive(Debug)]
pub struct Supervisor {
    place: Place,
    listener: UnixListener,
    signals: SignalFd,
    services: Vec<Running>,
    waiters: Vec<Waiter>,
    ending: bool,
}

#[derive(Debug)]
struct Running {
    service: Service,
    state: State,
    pid: Option<i32>,
    since: Instant,
    /// Action after the end of the process.
    then: Then,
    kill_at: Option<Instant>,
    start_at: Option<Instant>,
    delay: Duration,
    restarts: u32,
    last_end: Option<String>,
    notify: Option<(UnixDatagram, PathBuf)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    AsDefined,
    Start,
    Stay,
    Forget,
}

#[derive(Debug)]
struct Waiter {
    stream: UnixStream,
    name: String,
    state: State,
    deadline: Instant,
}

impl Supervisor {
    /// Listens for orders and starts the services that start automatically.
    pub fn start(place: Place) -> Result<Supervisor> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.thread_block().context("cannot block signals")?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&mask, flags).context("cannot read signals")?;
        if let Some(dir) = place.socket.parent() {
            fs::create_dir_all(dir)?;
        }
        let listener = wire::listen(&place.socket)?;
        let services = load(&place.services)?.into_iter().map(Running::new).collect();
        let waiters = Vec::new();
        let mut supervisor =
            Supervisor { place, listener, signals, services, waiters, ending: false };
        for index in 0..supervisor.services.len() {
            if supervisor.services[index].service.autostart {
                supervisor.launch(index);
            }
        }
        Ok(supervisor)
    }

    /// Runs until the supervisor is told to end and its services have ended.
    pub fn run(mut self) -> Result<()> {
        while !(self.ending && self.services.iter().all(|s| s.pid.is_none())) {
            let ready = self.wait_for_something()?;
            if ready.signal {
                self.take_signals()?;
            }
            for index in ready.notified {
                self.services[index].take_notice();
            }
            if ready.order {
                self.take_order();
            }
            self.reap();
            self.do_what_is_due(Instant::now());
            self.answer_waiters(Instant::now());
        }
        // The socket is removed last: waiting processes take that as the end.
        fs::remove_file(&self.place.socket).context("cannot remove the socket")
    }

    fn wait_for_something(&self) -> Result<Ready> {
        let now = Instant::now();
        let due = self
            .services
            .iter()
            .flat_map(|s| [s.kill_at, s.start_at])
            .flatten()
            .chain(self.waiters.iter().map(|w| w.deadline))
            .min();
        let wait = due.map_or(IDLE, |due| due.saturating_duration_since(now)).min(IDLE);
        // Rounded up; otherwise the loop would spin through the last millisecond.
        let timeout = PollTimeout::try_from(wait + Duration::from_millis(1))?;
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let mut owners = Vec::new();
        for (index, service) in self.services.iter().enumerate() {
            if let Some((socket, _)) = &service.notify {
                fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
                owners.push(index);
            }
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot poll"),
        }
        let readable = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let notified = owners.iter().zip(&fds[2..]).filter(|(_, fd)| readable(fd)).map(|(i, _)| *i);
        Ok(Ready {
            signal: readable(&fds[0]),
            order: readable(&fds[1]),
            notified: notified.collect(),
        })
    }

    fn take_signals(&mut self) -> Result<()> {
        while let Some(info) = self.signals.read_signal().context("cannot read a signal")? {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                self.end();
            }
        }
        Ok(())
    }

    fn take_order(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        let order = match wire::receive::<Order>(&stream) {
            Ok(order) => order,
            Err(error) => {
                eprintln!("supervisor: an order was not understood: {error:#}");
                return;
            }
        };
        if let Order::Wait { name, state, within_ms } = order {
            let deadline = Instant::now() + Duration::from_millis(within_ms);
            if self.waiters.len() < WAITERS_MAX {
                self.waiters.push(Waiter { stream, name, state, deadline });
            }
            return;
        }
        let error = self.obey(order).err().map(|error| format!("{error:#}"));
        self.answer(&stream, error);
    }

    fn obey(&mut self, order: Order) -> Result<()> {
        match order {
            Order::Status | Order::Wait { .. } => {}
            Order::Put { services } => self.put(services)?,
            Order::Start { name } => {
                let index = self.find(&name)?;
                let service = &mut self.services[index];
                if service.pid.is_none() {
                    self.launch(index);
                } else if service.kill_at.is_some() {
                    service.then = Then::Start;
                }
            }
            Order::Stop { name } => {
                let index = self.find(&name)?;
                self.services[index].stop(Then::Stay);
            }
            Order::Kill { name, hold } => {
                let index = self.find(&name)?;
                let service = &mut self.services[index];
                if hold {
                    service.then = Then::Stay;
                    service.start_at = None;
                }
                // The kill was ordered, so it must not lengthen the delay of the restart.
                service.delay = Duration::ZERO;
                service.signal(Signal::SIGKILL);
            }
            Order::Restart { name } => {
                let index = self.find(&name)?;
                if self.services[index].pid.is_none() {
                    self.launch(index);
                } else {
                    self.services[index].stop(Then::Start);
                }
            }
            Order::End => self.end(),
        }
        Ok(())
    }

    fn put(&mut self, new: Vec<Service>) -> Result<()> {
        new.iter().try_for_each(check)?;
        save(&self.place.services, &new)?;
        let names: BTreeSet<String> = new.iter().map(|service| service.name.clone()).collect();
        for service in &mut self.services {
            if !names.contains(&service.service.name) {
                service.stop(Then::Forget);
            }
        }
        self.services.retain(|s| s.then != Then::Forget || s.pid.is_some());
        for definition in new {
            match self.find(&definition.name) {
                Ok(index) => {
                    let service = &mut self.services[index];
                    let changed = service.service != definition;
                    service.service = definition;
                    if changed && service.pid.is_some() {
                        service.stop(Then::Start);
                    } else if changed && service.service.autostart {
                        self.launch(index);
                    }
                }
                Err(_) => {
                    self.services.push(Running::new(definition));
                    let index = self.services.len() - 1;
                    if self.services[index].service.autostart {
                        self.launch(index);
                    }
                }
            }
        }
        Ok(())
    }

    fn end(&mut self) {
        self.ending = true;
        for service in &mut self.services {
            service.stop(Then::Stay);
        }
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.services
            .iter()
            .position(|service| service.service.name == name)
            .ok_or_else(|| anyhow!("there is no service {name}"))
    }

    fn launch(&mut self, index: usize) {
        let place = &self.place;
        let service = &mut self.services[index];
        service.start_at = None;
        service.then = Then::AsDefined;
        let name = service.service.name.clone();
        let below = |slice: &PathBuf| slice.join(format!("{name}.service"));
        let cgroup = place.slice.as_ref().map(below);
        let cpu = service.service.cpu_weight.zip(place.cpu_slice.as_ref().map(below));
        if service.service.notify && service.notify.is_none() {
            let path = place.socket.with_file_name(format!("notify-{name}.sock"));
            match listen_for_notice(&path) {
                Ok(socket) => service.notify = Some((socket, path)),
                Err(error) => eprintln!("supervisor: {name}: {error:#}"),
            }
        }
        let around = Surroundings {
            cgroup: cgroup.as_deref(),
            cpu: cpu.as_ref().map(|(weight, dir)| (*weight, dir.as_path())),
            notify: service.notify.as_ref().map(|(_, path)| path.as_path()),
            bound: place.bound,
        };
        match spawn(&service.service, &around) {
            Ok(pid) => {
                service.pid = Some(pid);
                service.since = Instant::now();
                let waits = service.service.notify;
                service.state = if waits { State::Starting } else { State::Ready };
            }
            Err(error) => {
                eprintln!("supervisor: {name}: {error:#}");
                service.ended(&format!("{error:#}"), false);
            }
        }
    }

    fn reap(&mut self) {
        loop {
            let (pid, how, clean) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit code {code}"), code == 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid, format!("killed by {signal}"), false)
                }
                Err(Errno::EINTR) => continue,
                // Stops and continues are not reported; anything else means that no child is left.
                Ok(_) | Err(_) => return,
            };
            // Another pid is an orphan that the kernel gave to this init.
            let pid = Some(pid.as_raw());
            if let Some(service) = self.services.iter_mut().find(|s| s.pid == pid) {
                service.ended(&how, clean);
            }
        }
    }

    fn do_what_is_due(&mut self, now: Instant) {
        self.services.retain(|s| s.then != Then::Forget || s.pid.is_some());
        for index in 0..self.services.len() {
            let service = &mut self.services[index];
            if service.kill_at.is_some_and(|at| at <= now) {
                service.kill_at = None;
                service.signal(Signal::SIGKILL);
            }
            if !self.ending && self.services[index].start_at.is_some_and(|at| at <= now) {
                if self.services[index].then == Then::AsDefined {
                    self.services[index].restarts += 1;
                }
                self.launch(index);
            }
        }
    }

    fn answer_waiters(&mut self, now: Instant) {
        let mut left = Vec::new();
        for waiter in std::mem::take(&mut self.waiters) {
            match self.outcome(&waiter, now) {
                Some(error) => self.answer(&waiter.stream, error),
                None => left.push(waiter),
            }
        }
        self.waiters = left;
    }

    /// Returns none while the waiter must wait; otherwise the error, if there is one.
    fn outcome(&self, waiter: &Waiter, now: Instant) -> Option<Option<String>> {
        let name = &waiter.name;
        let Ok(index) = self.find(name) else {
            return Some(Some(format!("there is no service {name}")));
        };
        let service = &self.services[index];
        let restarting = service.then == Then::Start && service.pid.is_some();
        if service.state == waiter.state && !restarting {
            return Some(None);
        }
        let end = service.last_end.as_deref().unwrap_or("it was not started");
        let log = service.service.log.display();
        if service.state == State::Stopped && waiter.state == State::Ready {
            return Some(Some(format!("service {name} does not run: {end}; see {log}")));
        }
        (waiter.deadline <= now).then(|| {
            let state = service.state;
            Some(format!("service {name} is still {state:?} (last: {end}); see {log}"))
        })
    }

    fn answer(&self, stream: &UnixStream, error: Option<String>) {
        let services = self.services.iter().map(Running::status).collect();
        if let Err(error) = wire::send(stream, &Answer { error, services }) {
            eprintln!("supervisor: nobody waited for the answer: {error:#}");
        }
    }
}

#[derive(Debug)]
struct Ready {
    signal: bool,
    order: bool,
    notified: Vec<usize>,
}

impl Running {
    fn new(service: Service) -> Running {
        Running {
            service,
            state: State::Stopped,
            pid: None,
            since: Instant::now(),
            then: Then::AsDefined,
            kill_at: None,
            start_at: None,
            delay: DELAY_MIN,
            restarts: 0,
            last_end: None,
            notify: None,
        }
    }

    fn status(&self) -> Status {
        Status {
            name: self.service.name.clone(),
            state: self.state,
            pid: self.pid,
            restarts: self.restarts,
            last_end: self.last_end.clone(),
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid
            && let Err(errno) = kill(Pid::from_raw(pid), signal)
        {
            eprintln!("supervisor: {}: {signal} was not sent: {errno}", self.service.name);
        }
    }

    fn stop(&mut self, then: Then) {
        self.then = then;
        self.start_at = None;
        if self.pid.is_some() {
            self.signal(Signal::SIGTERM);
            self.kill_at = Some(Instant::now() + KILL_AFTER_TERM);
        } else {
            self.state = State::Stopped;
        }
    }

    fn ended(&mut self, how: &str, clean: bool) {
        self.pid = None;
        self.kill_at = None;
        self.last_end = Some(how.to_owned());
        let again = match (self.then, self.service.restart) {
            (Then::Stay | Then::Forget, _) => false,
            (Then::Start, _) | (Then::AsDefined, Restart::Always) => true,
            (Then::AsDefined, Restart::OnFailure) => !clean,
            (Then::AsDefined, Restart::No) => false,
        };
        if !again {
            self.state = State::Stopped;
            return;
        }
        let ran = self.since.elapsed();
        self.delay = if ran >= LONG_ENOUGH {
            DELAY_MIN
        } else {
            (self.delay * 2).clamp(DELAY_MIN, DELAY_MAX)
        };
        let delay = if self.then == Then::Start { Duration::ZERO } else { self.delay };
        self.start_at = Some(Instant::now() + delay);
        self.state = State::Waiting;
    }

    fn take_notice(&mut self) {
        let Some((socket, _)) = &self.notify else { return };
        let mut buffer = [0_u8; 4096];
        while let Ok(len) = socket.recv(&mut buffer) {
            let ready = buffer[..len].split(|b| *b == b'\n').any(|line| line == b"READY=1");
            if ready && self.state == State::Starting {
                self.state = State::Ready;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.notify {
            // The socket may be gone with its directory.
            drop(fs::remove_file(path));
        }
    }
}

fn listen_for_notice(path: &Path) -> Result<UnixDatagram> {
    if fs::symlink_metadata(path).is_ok() {
        fs::remove_file(path)?;
    }
    let socket =
        UnixDatagram::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
