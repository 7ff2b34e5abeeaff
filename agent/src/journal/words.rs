//! Words in the journal's records. Records on disk have them, so a word never changes.

/// A cause in a record: empty when the change was asked for.
pub(super) mod cause {
    use proto::Cause;
    use serde::{Deserialize, Deserializer, Serializer};

    const WORDS: &[(Cause, &str)] = &[
        (Cause::ASKED, ""),
        (Cause::Ttl, "ttl"),
        (Cause::Idle, "idle"),
        (Cause::RetentionExceeded, "kept_too_long"),
        (Cause::FoundDown, "found_down"),
        (Cause::FoundUp, "found_up"),
        (Cause::NodeRebooted, "node_rebooted"),
        (Cause::Released, "released"),
        (Cause::NodeLost, "node_lost"),
        (Cause::Moved, "moved"),
        (Cause::Rebooted, "rebooted"),
    ];

    pub(crate) fn serialize<S: Serializer>(cause: &Cause, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(super::word(WORDS, *cause))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Cause, D::Error> {
        Ok(super::of_word(WORDS, &String::deserialize(from)?))
    }
}

/// How a sandbox was stopped, in a record: empty while it is not stopped, and when it is unknown.
pub(super) mod stop_result {
    use proto::sandbox::v1::StopResult;
    use serde::{Deserialize, Deserializer, Serializer};

    const WORDS: &[(StopResult, &str)] = &[
        (StopResult::Unspecified, ""),
        (StopResult::ShutDown, "shut_down"),
        (StopResult::Killed, "killed"),
    ];

    pub(crate) fn serialize<S: Serializer>(how: &StopResult, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(super::word(WORDS, *how))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<StopResult, D::Error> {
        Ok(super::of_word(WORDS, &String::deserialize(from)?))
    }
}

/// Reach of a sandbox, in a record: a word, with the names of a list behind it. A word of a later
/// version reads as the tightest, as a list does to a version that has none.
pub(super) mod egress {
    use proto::spec::Egress;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(egress: &Egress, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&egress.to_string())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Egress, D::Error> {
        Ok(String::deserialize(from)?.parse().unwrap_or(Egress::None))
    }
}

/// Visibility of a port, in a record. A word of a later version reads as the tightest.
pub(super) mod visibility {
    use proto::visibility::Visibility;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(who: &Visibility, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(who.word())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Visibility, D::Error> {
        Ok(String::deserialize(from)?.parse().unwrap_or(Visibility::Private))
    }
}

/// A step in a record.
pub(super) mod progress {
    use proto::Progress;
    use serde::{Deserialize, Deserializer, Serializer};

    const WORDS: &[(Progress, &str)] = &[
        (Progress::Unspecified, ""),
        (Progress::Placing, "placing"),
        (Progress::Queued, "queued"),
        (Progress::Clone, "clone"),
        (Progress::Configure, "configure"),
        (Progress::ResizeOffline, "resize_offline"),
        (Progress::Start, "start"),
        (Progress::Resize, "resize"),
        (Progress::Probe, "probe"),
        (Progress::Done, "done"),
        (Progress::Adopt, "adopt"),
        (Progress::Release, "release"),
        (Progress::Export, "hand_over"),
        (Progress::Import, "take_over"),
        (Progress::Files, "files"),
    ];

    pub(crate) fn serialize<S: Serializer>(step: &Progress, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(super::word(WORDS, *step))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Progress, D::Error> {
        Ok(super::of_word(WORDS, &String::deserialize(from)?))
    }
}

fn word<T: Copy + PartialEq>(words: &[(T, &'static str)], value: T) -> &'static str {
    words.iter().find(|(other, _)| *other == value).map_or("", |(_, word)| word)
}

/// The value of a word. A word of a later version reads as the default, so that this version can read
/// the record; its next update writes the default's word.
fn of_word<T: Copy + Default>(words: &[(T, &'static str)], word: &str) -> T {
    words.iter().find(|(_, other)| *other == word).map_or_else(T::default, |(value, _)| *value)
}

#[cfg(test)]
mod tests {
    use proto::{Cause, Progress, spec::Egress};

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Stored {
        #[serde(with = "super::cause")]
        cause: Cause,
        #[serde(with = "super::progress")]
        step: Progress,
    }

    #[test]
    fn list_is_a_word_that_a_version_without_lists_reads_as_none() {
        #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        struct Stored {
            #[serde(with = "super::egress")]
            egress: Egress,
        }
        let stored = Stored { egress: "allow=*.npmjs.org,github.com".parse().expect("a list") };
        let text = serde_json::to_string(&stored).expect("written");
        assert_eq!(text, r#"{"egress":"allow=*.npmjs.org,github.com"}"#);
        assert_eq!(serde_json::from_str::<Stored>(&text).expect("read"), stored);
        // A word that is not known is read like this, as that one was before there were lists.
        let later = serde_json::from_str::<Stored>(r#"{"egress":"allow=a.b:443"}"#).expect("read");
        assert_eq!(later.egress, Egress::None);
    }

    #[test]
    fn every_cause_and_step_round_trips_through_its_word() {
        let causes = (0..).map_while(|number| Cause::try_from(number).ok());
        let steps = (0..).map_while(|number| Progress::try_from(number).ok());
        let last = Cause::ASKED;
        for (cause, step) in causes.chain(std::iter::repeat(last)).zip(steps) {
            let text = serde_json::to_string(&Stored { cause, step }).expect("written");
            let read: Stored = serde_json::from_str(&text).expect("read");
            assert_eq!((read.cause, read.step), (cause, step), "{text}");
        }
        let later = r#"{"cause":"whim","step":"levitate"}"#;
        let read: Stored = serde_json::from_str(later).expect("read");
        assert_eq!((read.cause, read.step), (Cause::ASKED, Progress::Unspecified));
    }
}
