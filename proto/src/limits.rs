//! Limits of a team: how much it may have at once, and how often it may create, change and run commands.

use std::{fmt, str::FromStr, time::Duration};

use crate::{duration, id::Invalid, sandbox::v1 as wire, spec::Egress};

/// Most that a rate may allow in its window: so many times are remembered.
pub const COUNT_MAX: u32 = 10_000;
/// Longest window of a rate: what it counts is remembered for this time.
pub const WINDOW_MAX: Duration = Duration::from_hours(24);

/// Word for a limit that is none.
const NONE: &str = "none";

/// Number of creations in any window of a length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Most in a window.
    pub count: u32,
    /// Length of the window.
    pub window: Duration,
}

impl Rate {
    /// Checks the bounds of a rate.
    ///
    /// # Errors
    /// When the count or the window is too large, or the window is no whole number of seconds.
    pub fn new(count: u32, window: Duration) -> Result<Self, Invalid> {
        let whole = window.subsec_nanos() == 0 && !window.is_zero();
        if count > COUNT_MAX || window > WINDOW_MAX || !whole {
            return Err(Invalid::new("rate", RATE));
        }
        Ok(Self { count, window })
    }
}

const RATE: &str = "must be a count of at most 10000 and a window of at most 24 h, such as 10/hour \
                    or 100/30m";

/// Windows with a name of their own.
const NAMED: [(&str, u64); 4] = [("second", 1), ("minute", 60), ("hour", 3600), ("day", 24 * 3600)];

impl FromStr for Rate {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new("rate", RATE);
        let (count, window) = text.split_once('/').ok_or_else(wrong)?;
        let named = NAMED.iter().find(|(name, _)| *name == window);
        let window = match named {
            Some((_, seconds)) => Some(Duration::from_secs(*seconds)),
            None => duration::parse(window),
        };
        let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
        let count = count.parse().ok().filter(|_| digits).ok_or_else(wrong)?;
        Self::new(count, window.ok_or_else(wrong)?)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.window.as_secs();
        match NAMED.iter().find(|(_, named)| *named == seconds) {
            Some((name, _)) => write!(f, "{}/{name}", self.count),
            None if seconds.is_multiple_of(3600) => write!(f, "{}/{}h", self.count, seconds / 3600),
            None if seconds.is_multiple_of(60) => write!(f, "{}/{}m", self.count, seconds / 60),
            None => write!(f, "{}/{seconds}s", self.count),
        }
    }
}

/// Limit, or the word that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit<T> {
    /// So much at most.
    Max(T),
    /// No limit, whatever the default is.
    Unlimited,
}

impl<T: Copy> Limit<T> {
    /// Returns the most that is allowed; `None` without a limit.
    pub fn max(self) -> Option<T> {
        match self {
            Self::Max(max) => Some(max),
            Self::Unlimited => None,
        }
    }
}

impl<T: fmt::Display> fmt::Display for Limit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Max(max) => max.fmt(f),
            Self::Unlimited => f.write_str(NONE),
        }
    }
}

impl<T: FromStr> FromStr for Limit<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == NONE { Ok(Self::Unlimited) } else { text.parse().map(Self::Max) }
    }
}

/// Limits of a team. What is `None` is as the controller's defaults say; in these, `None` is no
/// limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TeamLimits {
    /// Sandboxes that are not deleted.
    pub sandboxes: Option<Limit<u64>>,
    /// Sum of their cores.
    pub cpu_cores: Option<Limit<u64>>,
    /// Sum of their memory, MiB.
    pub memory_mib: Option<Limit<u64>>,
    /// Sum of the disks that were asked for, GiB.
    pub disk_gib: Option<Limit<u64>>,
    /// Creations of the team.
    pub creates: Option<Limit<Rate>>,
    /// Creations of each of its users.
    pub user_creates: Option<Limit<Rate>>,
    /// Most that a sandbox may reach.
    pub egress: Option<Egress>,
    /// Starts of commands.
    pub execs: Option<Limit<Rate>>,
    /// Commands that run at the same time.
    pub running_execs: Option<Limit<u64>>,
    /// Streams that are open at the same time.
    pub streams: Option<Limit<u64>>,
    /// Output of commands that is kept on the nodes, MiB.
    pub output_mib: Option<Limit<u64>>,
    /// Events that are kept.
    pub events: Option<Limit<u64>>,
    /// Changes of sandboxes that there are.
    pub changes: Option<Limit<Rate>>,
}

impl TeamLimits {
    /// Returns these limits, with what is not set taken from `defaults`.
    #[must_use]
    pub fn or(self, defaults: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.or(defaults.sandboxes),
            cpu_cores: self.cpu_cores.or(defaults.cpu_cores),
            memory_mib: self.memory_mib.or(defaults.memory_mib),
            disk_gib: self.disk_gib.or(defaults.disk_gib),
            creates: self.creates.or(defaults.creates),
            user_creates: self.user_creates.or(defaults.user_creates),
            egress: self.egress.or(defaults.egress),
            execs: self.execs.or(defaults.execs),
            running_execs: self.running_execs.or(defaults.running_execs),
            streams: self.streams.or(defaults.streams),
            output_mib: self.output_mib.or(defaults.output_mib),
            events: self.events.or(defaults.events),
            changes: self.changes.or(defaults.changes),
        }
    }

    /// Parses a stored text. What a later version wrote, and this one does not know, is left out.
    pub fn stored(text: &str) -> Self {
        let mut limits = Self::default();
        for (key, value) in text.split(' ').filter_map(|word| word.split_once('=')) {
            match key {
                "sandboxes" => limits.sandboxes = value.parse().ok(),
                "cpu_cores" => limits.cpu_cores = value.parse().ok(),
                "memory_mib" => limits.memory_mib = value.parse().ok(),
                "disk_gib" => limits.disk_gib = value.parse().ok(),
                "creates" => limits.creates = value.parse().ok(),
                "user_creates" => limits.user_creates = value.parse().ok(),
                // What a later version wrote is a word for something tighter than open.
                "egress" => limits.egress = Some(value.parse().unwrap_or(Egress::None)),
                "execs" => limits.execs = value.parse().ok(),
                "running_execs" => limits.running_execs = value.parse().ok(),
                "streams" => limits.streams = value.parse().ok(),
                "output_mib" => limits.output_mib = value.parse().ok(),
                "events" => limits.events = value.parse().ok(),
                "changes" => limits.changes = value.parse().ok(),
                _ => {}
            }
        }
        limits
    }

    /// Changes the limits that a mask names to those of a message; an unset one is the default
    /// again.
    ///
    /// # Errors
    /// When the mask names none or an unknown field, or a limit is wrong.
    pub fn updated(mut self, asked: &wire::TeamLimits, paths: &[String]) -> Result<Self, Invalid> {
        if paths.is_empty() {
            return Err(Invalid::new("update_mask", fields()));
        }
        for path in paths {
            if path == "limits" {
                for (field, _) in FIELDS {
                    self.set(field, asked)?;
                }
                continue;
            }
            let known = FIELDS.iter().find(|(_, known)| known == path);
            let (field, _) = known.ok_or_else(|| Invalid::new("update_mask", fields()))?;
            self.set(field, asked)?;
        }
        Ok(self)
    }

    /// Sets one limit to that of a message.
    fn set(&mut self, field: &Field, asked: &wire::TeamLimits) -> Result<(), Invalid> {
        match field {
            Field::Sandboxes => self.sandboxes = asked.sandboxes.map(limit_of),
            Field::CpuCores => self.cpu_cores = asked.cpu_cores.map(limit_of),
            Field::MemoryMib => self.memory_mib = asked.memory_mib.map(limit_of),
            Field::DiskGib => self.disk_gib = asked.disk_gib.map(limit_of),
            Field::Creates => self.creates = rate_of("limits.creates", asked.creates.as_ref())?,
            Field::UserCreates => {
                self.user_creates = rate_of("limits.user_creates", asked.user_creates.as_ref())?;
            }
            Field::Egress => {
                self.egress = Egress::read(asked.egress, &asked.egress_names, "limits.egress")?;
            }
            Field::Execs => self.execs = rate_of("limits.execs", asked.execs.as_ref())?,
            Field::RunningExecs => self.running_execs = asked.running_execs.map(limit_of),
            Field::Streams => self.streams = asked.streams.map(limit_of),
            Field::OutputMib => self.output_mib = asked.output_mib.map(limit_of),
            Field::Events => self.events = asked.events.map(limit_of),
            Field::Changes => self.changes = rate_of("limits.changes", asked.changes.as_ref())?,
        }
        Ok(())
    }
}

/// Fields of the limits, and how a mask names them.
const FIELDS: &[(Field, &str)] = &[
    (Field::Sandboxes, "limits.sandboxes"),
    (Field::CpuCores, "limits.cpu_cores"),
    (Field::MemoryMib, "limits.memory_mib"),
    (Field::DiskGib, "limits.disk_gib"),
    (Field::Creates, "limits.creates"),
    (Field::UserCreates, "limits.user_creates"),
    (Field::Egress, "limits.egress"),
    (Field::Execs, "limits.execs"),
    (Field::RunningExecs, "limits.running_execs"),
    (Field::Streams, "limits.streams"),
    (Field::OutputMib, "limits.output_mib"),
    (Field::Events, "limits.events"),
    (Field::Changes, "limits.changes"),
];

/// One of the limits.
#[derive(Debug, Clone, Copy)]
enum Field {
    Sandboxes,
    CpuCores,
    MemoryMib,
    DiskGib,
    Creates,
    UserCreates,
    Egress,
    Execs,
    RunningExecs,
    Streams,
    OutputMib,
    Events,
    Changes,
}

fn fields() -> String {
    let names: Vec<_> = FIELDS.iter().map(|(_, name)| *name).collect();
    format!("must name fields of: limits, {}", names.join(", "))
}

fn limit_of(limit: wire::Limit) -> Limit<u64> {
    if limit.unlimited { Limit::Unlimited } else { Limit::Max(limit.max) }
}

fn rate_of(
    field: &'static str,
    rate: Option<&wire::RateLimit>,
) -> Result<Option<Limit<Rate>>, Invalid> {
    let Some(rate) = rate else { return Ok(None) };
    if rate.unlimited {
        return Ok(Some(Limit::Unlimited));
    }
    let window = rate.window.and_then(duration::read).unwrap_or_default();
    let checked = Rate::new(rate.count, window).map_err(|invalid| invalid.named(field));
    checked.map(|rate| Some(Limit::Max(rate)))
}

/// Text for the store: the limits that are set, as words.
impl fmt::Display for TeamLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |limit: Option<Limit<u64>>| limit.map(|limit| limit.to_string());
        let rate = |limit: Option<Limit<Rate>>| limit.map(|limit| limit.to_string());
        let words = [
            ("sandboxes", text(self.sandboxes)),
            ("cpu_cores", text(self.cpu_cores)),
            ("memory_mib", text(self.memory_mib)),
            ("disk_gib", text(self.disk_gib)),
            ("creates", rate(self.creates)),
            ("user_creates", rate(self.user_creates)),
            ("egress", self.egress.as_ref().map(Egress::to_string)),
            ("execs", rate(self.execs)),
            ("running_execs", text(self.running_execs)),
            ("streams", text(self.streams)),
            ("output_mib", text(self.output_mib)),
            ("events", text(self.events)),
            ("changes", rate(self.changes)),
        ];
        let words = words.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        f.write_str(&words.collect::<Vec<_>>().join(" "))
    }
}

impl From<TeamLimits> for wire::TeamLimits {
    fn from(limits: TeamLimits) -> Self {
        let limit = |limit: Limit<u64>| wire::Limit {
            max: limit.max().unwrap_or_default(),
            unlimited: limit == Limit::Unlimited,
        };
        let rate = |limit: Limit<Rate>| match limit {
            Limit::Unlimited => wire::RateLimit { unlimited: true, ..Default::default() },
            Limit::Max(Rate { count, window }) => {
                let seconds = i64::try_from(window.as_secs()).unwrap_or(i64::MAX);
                let window = Some(prost_types::Duration { seconds, nanos: 0 });
                wire::RateLimit { count, window, unlimited: false }
            }
        };
        Self {
            sandboxes: limits.sandboxes.map(limit),
            cpu_cores: limits.cpu_cores.map(limit),
            memory_mib: limits.memory_mib.map(limit),
            disk_gib: limits.disk_gib.map(limit),
            creates: limits.creates.map(rate),
            user_creates: limits.user_creates.map(rate),
            egress: limits.egress.as_ref().map(wire::Egress::from).unwrap_or_default().into(),
            egress_names: limits.egress.as_ref().map(Egress::names).unwrap_or_default(),
            execs: limits.execs.map(rate),
            running_execs: limits.running_execs.map(limit),
            streams: limits.streams.map(limit),
            output_mib: limits.output_mib.map(limit),
            events: limits.events.map(limit),
            changes: limits.changes.map(rate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(count: u32, seconds: u64) -> Rate {
        Rate { count, window: Duration::from_secs(seconds) }
    }

    #[test]
    fn rates_are_written_as_a_count_and_a_window() {
        for (text, known) in [
            ("10/hour", rate(10, 3600)),
            ("0/day", rate(0, 86_400)),
            ("100/30m", rate(100, 1800)),
            ("1/90s", rate(1, 90)),
            ("7/12h", rate(7, 43_200)),
        ] {
            assert_eq!(text.parse(), Ok(known));
            assert_eq!(known.to_string(), text);
        }
        assert_eq!("10/60m".parse(), Ok(rate(10, 3600)));
        for wrong in ["", "10", "/hour", "10/", "10/year", "+1/hour", "10001/hour", "1/25h", "1/0s"]
        {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn limits_round_trip_through_their_text_and_the_wire() {
        let limits = TeamLimits {
            sandboxes: Some(Limit::Max(5)),
            cpu_cores: Some(Limit::Unlimited),
            creates: Some(Limit::Max(rate(10, 3600))),
            user_creates: Some(Limit::Unlimited),
            egress: Some(Egress::None),
            execs: Some(Limit::Max(rate(600, 60))),
            running_execs: Some(Limit::Max(64)),
            streams: Some(Limit::Max(100)),
            output_mib: Some(Limit::Unlimited),
            events: Some(Limit::Max(5000)),
            changes: Some(Limit::Max(rate(60, 60))),
            ..TeamLimits::default()
        };
        assert_eq!(
            limits.to_string(),
            "sandboxes=5 cpu_cores=none creates=10/hour user_creates=none egress=none \
             execs=600/minute running_execs=64 streams=100 output_mib=none events=5000 \
             changes=60/minute"
        );
        assert_eq!(TeamLimits::stored(&format!("{limits} later=3 disk_gib=?")), limits);
        assert_eq!(TeamLimits::stored(""), TeamLimits::default());
        let all = ["limits".to_owned()];
        assert_eq!(TeamLimits::default().updated(&limits.clone().into(), &all), Ok(limits.clone()));
        assert_eq!(TeamLimits::stored("egress=later").egress, Some(Egress::None));
        let listed: Egress = "allow=*.npmjs.org,github.com".parse().expect("a list");
        let some = TeamLimits { egress: Some(listed), ..TeamLimits::default() };
        assert_eq!(some.to_string(), "egress=allow=*.npmjs.org,github.com");
        assert_eq!(TeamLimits::stored(&some.to_string()), some);
        assert_eq!(TeamLimits::default().updated(&some.clone().into(), &all), Ok(some));
        // Unset is the default again, and what is not named stays.
        let one = ["limits.sandboxes".to_owned()];
        let now = limits.clone().updated(&wire::TeamLimits::default(), &one).expect("a mask");
        assert_eq!(now, TeamLimits { sandboxes: None, ..limits.clone() });
        for (_, field) in FIELDS {
            let only = [(*field).to_owned()];
            let one = TeamLimits::default().updated(&limits.clone().into(), &only);
            let one = one.expect("a field");
            assert_eq!(one.to_string().split(' ').count(), 1, "{field}");
            let rest = limits.clone().updated(&wire::TeamLimits::default(), &only);
            assert_eq!(rest.expect("a field").or(one), limits, "{field}");
        }
        for wrong in [vec![], vec!["name".to_owned()]] {
            assert!(limits.clone().updated(&limits.clone().into(), &wrong).is_err());
        }
        let endless = wire::RateLimit { count: 1, ..Default::default() };
        let asked = wire::TeamLimits { creates: Some(endless), ..Default::default() };
        assert!(limits.updated(&asked, &["limits.creates".to_owned()]).is_err(), "no window");
    }

    #[test]
    fn own_limit_wins_over_the_default() {
        let own = TeamLimits { sandboxes: Some(Limit::Unlimited), ..TeamLimits::default() };
        let defaults = TeamLimits {
            sandboxes: Some(Limit::Max(1)),
            disk_gib: Some(Limit::Max(2)),
            ..TeamLimits::default()
        };
        let both = own.or(defaults);
        assert_eq!(
            (both.sandboxes.and_then(Limit::max), both.disk_gib),
            (None, Some(Limit::Max(2)))
        );
    }
}
