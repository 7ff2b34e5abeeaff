//! Validity of a token or an SSH key: the arguments that say it, and the columns and values that show it.

use std::time::Duration;

use clap::Args;
use prost_types::Timestamp;
use serde_json::{Value, json};

use crate::{
    output::{
        layout::Column,
        table::{self, Cell, Colour},
        time,
    },
    values,
};

/// Column of the state, which the other three follow.
pub(super) const STATE: Column = Column::new("STATE").rank(1);
/// Column of the time since it was made.
pub(super) const CREATED: Column = Column::new("CREATED").rank(5).right();
/// Column of the time until it expires; its rank is that of the list.
pub(super) const EXPIRES: Column = Column::new("EXPIRES").right();
/// Column of the time since its last use.
pub(super) const USED: Column = Column::new("USED").right();

/// Arguments that say for whom something is good, and for how long.
#[derive(Debug, Args)]
pub(super) struct Terms {
    /// The person or program that it is for, such as ada@example.com
    #[arg(long)]
    user: Option<String>,
    /// Time after which it expires, such as 12h or 90d [default: never]
    #[arg(long, value_name = "TIME", value_parser = values::age)]
    expires: Option<Duration>,
}

impl Terms {
    /// Returns the user and the time to live of a request.
    pub(super) fn into_request(self) -> (String, Option<prost_types::Duration>) {
        let ttl = self.expires.map(|time| prost_types::Duration {
            seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            nanos: 0,
        });
        (self.user.unwrap_or_default(), ttl)
    }
}

/// Times of something that is good until it expires or is ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Validity {
    pub(super) created: Option<Timestamp>,
    pub(super) expires: Option<Timestamp>,
    pub(super) used: Option<Timestamp>,
    pub(super) ended: Option<Timestamp>,
    /// Word for the end before its time, such as "revoked".
    pub(super) end: &'static str,
}

impl Validity {
    fn state(&self) -> (&'static str, Colour) {
        match (self.ended, self.expires) {
            (Some(_), _) => (self.end, Colour::Grey),
            (None, Some(at)) if at.seconds <= time::now_seconds() => ("expired", Colour::Grey),
            (None, _) => ("good", Colour::Green),
        }
    }

    /// Returns the cells of the four columns.
    pub(super) fn cells(&self) -> [Cell; 4] {
        let never = || table::cell("never");
        let (state, colour) = self.state();
        [
            table::cell(state).colour(colour),
            table::age(self.created),
            self.expires.map_or_else(never, |at| {
                table::cell(time::left(Some(at))).number(at.seconds as f64)
            }),
            self.used.map_or_else(never, |_| table::age(self.used)),
        ]
    }

    /// Adds the state and the times to an object in JSON.
    pub(super) fn add_to(&self, object: &mut Value) {
        object["state"] = json!(self.state().0);
        for (name, at) in
            [("created_at", self.created), ("expires_at", self.expires), ("used_at", self.used)]
        {
            object[name] = json!(time::rfc3339(at));
        }
        object[format!("{}_at", self.end)] = json!(time::rfc3339(self.ended));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_before_its_time_counts_more_than_its_time() {
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        let now = time::now_seconds();
        let good =
            Validity { created: at(1), expires: None, used: None, ended: None, end: "revoked" };
        for (expires, ended, expected) in [
            (None, None, "good"),
            (at(now + 1000), None, "good"),
            (at(now - 1), None, "expired"),
            (at(now - 1), at(5), "revoked"),
        ] {
            let validity = Validity { expires, ended, ..good };
            let mut shown = json!({ "id": "x" });
            validity.add_to(&mut shown);
            assert_eq!(shown["state"], expected, "{validity:?}");
            assert_eq!(shown["revoked_at"].is_null(), ended.is_none(), "{shown}");
        }
    }
}
