//! Sizes as people write them: `2g`, `512MiB`, `1.5G`. All units are powers of 1024.

/// Binary logarithm of the bytes of a MiB.
const MIB: u32 = 20;
/// Binary logarithm of the bytes of a GiB.
const GIB: u32 = 30;
/// Digits after the point at most.
const FRACTION_MAX: usize = 9;

/// Memory in MiB; a bare number is MiB.
pub(crate) fn memory(text: &str) -> Result<u32, String> {
    let wrong = "must be whole MiB, such as 2048, 512m, 2g, 1.5g or 2GiB; a bare number is MiB";
    whole(text, MIB).ok_or_else(|| wrong.into())
}

/// Disk in GiB; a bare number is GiB.
pub(crate) fn disk(text: &str) -> Result<u32, String> {
    let wrong = "must be whole GiB, such as 20, 20g, 20GiB or 1T; a bare number is GiB";
    whole(text, GIB).ok_or_else(|| wrong.into())
}

/// Number of cores.
pub(crate) fn cores(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "must be a whole number of cores, such as 2".into())
}

/// Size in a unit of so many bits; none when it is no size, too large, or not whole.
fn whole(text: &str, unit: u32) -> Option<u32> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let bits = match suffix.to_ascii_lowercase().as_str() {
        "" => unit,
        "k" | "kb" | "ki" | "kib" => 10,
        "m" | "mb" | "mi" | "mib" => 20,
        "g" | "gb" | "gi" | "gib" => 30,
        "t" | "tb" | "ti" | "tib" => 40,
        _ => return None,
    };
    let (integer, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.is_empty() || fraction.len() > FRACTION_MAX {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let integer = u128::from(integer.parse::<u64>().ok()?);
    let scaled = integer * scale + u128::from(fraction.parse::<u64>().ok()?);
    let (bytes, divisor) = (scaled.checked_mul(1 << bits)?, scale << unit);
    (bytes % divisor == 0).then(|| u32::try_from(bytes / divisor).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_way_to_write_a_size_means_the_same(gib in 0_u32..4000) {
            let mib = gib * 1024;
            for unit in ["g", "G", "gb", "GB", "gi", "Gi", "GiB", "gib"] {
                prop_assert_eq!(memory(&format!("{gib}{unit}")), Ok(mib));
                prop_assert_eq!(disk(&format!("{gib}{unit}")), Ok(gib));
                prop_assert_eq!(memory(&format!("{gib}.50{unit}")), Ok(mib + 512));
                let half = disk(&format!("{gib}.5{unit}"));
                prop_assert!(half.is_err());
            }
            prop_assert_eq!(memory(&mib.to_string()), Ok(mib));
            prop_assert_eq!(memory(&format!("{mib}m")), Ok(mib));
            prop_assert_eq!(memory(&format!("{}K", u64::from(mib) * 1024)), Ok(mib));
            prop_assert_eq!(disk(&gib.to_string()), Ok(gib));
            prop_assert_eq!(disk(&format!("{gib}T")), Ok(mib));
        }

        #[test]
        fn any_text_is_a_size_or_an_error_that_says_what_is_accepted(text in "\\PC{0,12}") {
            for parsed in [memory(&text), disk(&text), cores(&text)] {
                if let Err(error) = parsed {
                    prop_assert!(error.contains("such as"));
                }
            }
        }

        #[test]
        fn numbers_of_any_length_are_no_panic(text in "[0-9]{1,40}(\\.[0-9]{0,12})?[kKmMgGtT]?") {
            drop((memory(&text), disk(&text)));
        }
    }

    #[test]
    fn what_is_not_whole_or_not_a_size_is_refused() {
        for wrong in
            ["", "g", "-1", "+1", "1.", ".5", "1.5", "1 g", "2x", "2gg", "1e3", "512k", "4096T"]
        {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
        for wrong in ["1536m", "0.5g", "20q", "5000000T"] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
        assert_eq!((memory("0"), disk("0"), cores("0")), (Ok(0), Ok(0), Ok(0)), "the default");
        assert!(cores("1.5").is_err());
    }
}
