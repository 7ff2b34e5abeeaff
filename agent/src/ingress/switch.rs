//! Decides which of two services runs Caddy. Pure.
//!
//! Caddy reads its configuration and certificates at its start only. To use others, the second service is
//! started beside the first (both listen on the same ports), and then the first is stopped.

/// One of the two services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Colour {
    /// The service that is started at a boot.
    Blue,
    /// The service that is started only by a switch.
    Green,
}

impl Colour {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Blue, Self::Green];

    /// Returns the other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Blue => Self::Green,
            Self::Green => Self::Blue,
        }
    }

    /// Returns the name of the service's unit of systemd.
    pub const fn unit(self) -> &'static str {
        match self {
            // The only one of earlier versions, and the one that a boot starts.
            Self::Blue => "pve-sandbox-ingress.service",
            Self::Green => "pve-sandbox-ingress-green.service",
        }
    }
}

/// State of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Service {
    /// Nothing runs.
    Off,
    /// The service is starting, stopping, or waits to be started again.
    Busy,
    /// Caddy runs.
    On(Run),
}

/// Caddy that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Name of this run of the service: no other run has it.
    pub invocation: String,
    /// Time of its start, milliseconds since 1970.
    pub started_ms: u64,
}

/// Inputs that a Caddy was started with.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Name of the run.
    pub invocation: String,
    /// Digest of configuration, certificates and version.
    pub digest: String,
    /// Whether the listener with a certificate of the operator's own was in the configuration.
    #[serde(default)]
    pub secure: bool,
}

/// View of the services, and of what Caddy should run with.
#[derive(Debug)]
pub struct View<'a> {
    /// First of the two services.
    pub blue: Service,
    /// Second one.
    pub green: Service,
    /// Whether a boot starts Caddy: an operator who has disabled the service wants none.
    pub enabled: bool,
    /// Record of the last start, if one can be read.
    pub record: Option<&'a Record>,
    /// Digest of what Caddy should run with.
    pub digest: &'a str,
    /// Last change of the files that Caddy reads, milliseconds since 1970.
    pub changed_ms: u64,
    /// Whether a service has been busy for so long that its Caddy most likely ends at each start.
    pub stuck: bool,
}

/// Next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// All is as it should be, or a service is busy: look again later.
    Nothing,
    /// This run has started with the present files; record it.
    Adopt(Run),
    /// Nothing runs: start this one.
    Start(Colour),
    /// Start the other one, then stop this one.
    Replace(Colour),
    /// Both run: an earlier switch was interrupted; or one runs, and the other is stuck. Stop this one.
    Stop(Colour),
}

/// Decides the next step.
pub fn decide(view: &View<'_>) -> Step {
    match (&view.blue, &view.green) {
        (Service::Busy, Service::On(_)) if view.stuck => Step::Stop(Colour::Blue),
        (Service::On(_), Service::Busy) if view.stuck => Step::Stop(Colour::Green),
        (Service::Busy, _) | (_, Service::Busy) => Step::Nothing,
        (Service::Off, Service::Off) if view.enabled => Step::Start(Colour::Blue),
        (Service::Off, Service::Off) => Step::Nothing,
        (Service::On(run), Service::Off) => keep_or_replace(view, run, Colour::Blue),
        (Service::Off, Service::On(run)) => keep_or_replace(view, run, Colour::Green),
        (Service::On(blue), Service::On(green)) => {
            // The one that was started last has the later files.
            let is_blue_newer = blue.started_ms > green.started_ms;
            let keep_blue = match (is_current(view, blue), is_current(view, green)) {
                (true, false) => true,
                (false, true) => false,
                (true, true) | (false, false) => is_blue_newer,
            };
            Step::Stop(if keep_blue { Colour::Green } else { Colour::Blue })
        }
    }
}

fn keep_or_replace(view: &View<'_>, run: &Run, colour: Colour) -> Step {
    let is_recorded = view.record.is_some_and(|record| record.invocation == run.invocation);
    match is_current(view, run) {
        true if is_recorded => Step::Nothing,
        true => Step::Adopt(run.clone()),
        false => Step::Replace(colour),
    }
}

/// Returns whether a Caddy runs with the present files. Of one that systemd or an operator started, the time
/// of its start tells.
fn is_current(view: &View<'_>, run: &Run) -> bool {
    match view.record {
        Some(record) if record.invocation == run.invocation => record.digest == view.digest,
        Some(_) | None => run.started_ms >= view.changed_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(name: &str, started_ms: u64) -> Service {
        Service::On(run(name, started_ms))
    }

    fn run(name: &str, started_ms: u64) -> Run {
        Run { invocation: name.to_owned(), started_ms }
    }

    fn record(name: &str, digest: &str) -> Record {
        Record { invocation: name.to_owned(), digest: digest.to_owned(), secure: false }
    }

    /// Views the files of digest `d`, changed at 100.
    fn view(blue: Service, green: Service, record: Option<&Record>) -> View<'_> {
        let (enabled, stuck) = (true, false);
        View { blue, green, enabled, record, digest: "d", changed_ms: 100, stuck }
    }

    fn step(blue: Service, green: Service, record: Option<&Record>) -> Step {
        decide(&view(blue, green, record))
    }

    #[test]
    fn caddy_with_the_present_files_is_left_alone() {
        let known = record("a", "d");
        // Also when a file was written again with the same bytes.
        for started in [50, 150] {
            assert_eq!(step(on("a", started), Service::Off, Some(&known)), Step::Nothing);
            assert_eq!(step(Service::Off, on("a", started), Some(&known)), Step::Nothing);
        }
        assert_eq!(step(on("b", 100), Service::Off, Some(&known)), Step::Adopt(run("b", 100)));
        assert_eq!(step(on("b", 100), Service::Off, None), Step::Adopt(run("b", 100)));
    }

    #[test]
    fn caddy_with_other_files_is_replaced_by_the_other_service() {
        let known = record("a", "old");
        assert_eq!(step(on("a", 150), Service::Off, Some(&known)), Step::Replace(Colour::Blue));
        assert_eq!(step(Service::Off, on("a", 150), Some(&known)), Step::Replace(Colour::Green));
        // The version before started it, or systemd did after a crash.
        assert_eq!(step(on("b", 99), Service::Off, Some(&known)), Step::Replace(Colour::Blue));
        assert_eq!(step(on("b", 99), Service::Off, None), Step::Replace(Colour::Blue));
    }

    #[test]
    fn caddy_is_started_unless_an_operator_has_disabled_it() {
        assert_eq!(step(Service::Off, Service::Off, None), Step::Start(Colour::Blue));
        let view = View { enabled: false, ..view(Service::Off, Service::Off, None) };
        assert_eq!(decide(&view), Step::Nothing);
    }

    #[test]
    fn interrupted_switch_is_finished_with_the_newer_caddy() {
        let known = record("new", "d");
        assert_eq!(step(on("old", 50), on("new", 150), Some(&known)), Step::Stop(Colour::Blue));
        assert_eq!(step(on("new", 150), on("old", 50), Some(&known)), Step::Stop(Colour::Green));
        assert_eq!(step(on("old", 50), on("new", 150), None), Step::Stop(Colour::Blue));
        // Neither has the present files: the rest is the next look's.
        assert_eq!(step(on("x", 50), on("y", 60), None), Step::Stop(Colour::Blue));
    }

    #[test]
    fn nothing_is_done_while_a_service_is_busy() {
        for other in [Service::Off, Service::Busy, on("a", 150)] {
            assert_eq!(step(Service::Busy, other.clone(), None), Step::Nothing);
            assert_eq!(step(other, Service::Busy, None), Step::Nothing);
        }
    }

    #[test]
    fn stuck_service_is_stopped_where_the_other_one_runs() {
        let step = |blue, green| decide(&View { stuck: true, ..view(blue, green, None) });
        assert_eq!(step(Service::Busy, on("a", 150)), Step::Stop(Colour::Blue));
        assert_eq!(step(on("a", 150), Service::Busy), Step::Stop(Colour::Green));
        // systemd goes on to start the only one.
        for other in [Service::Off, Service::Busy] {
            assert_eq!(step(Service::Busy, other.clone()), Step::Nothing);
            assert_eq!(step(other, Service::Busy), Step::Nothing);
        }
    }
}
