//! Shares of teams in the event log: decides how many of the oldest events each loses. Pure.

use proto::name::Team;

/// Number of kept events of a team, or of the nodes, whose events are no team's.
type Count = (Option<Team>, u64);

/// Returns how many of the oldest events of each share are too many: those beyond the maximum of its
/// team, and then, if all together are more than `max`, those of the largest shares. A share within
/// an equal part of `max` loses nothing for what others have.
pub fn surplus(counts: Vec<Count>, max_of: impl Fn(&Team) -> Option<u64>, max: u64) -> Vec<Count> {
    let limited = |(share, count): &Count| {
        let own = share.as_ref().and_then(&max_of);
        own.map_or(*count, |own| own.min(*count))
    };
    let within: Vec<u64> = counts.iter().map(limited).collect();
    let level = level(within.clone(), max);
    let surplus = counts.into_iter().zip(within);
    let surplus = surplus.map(|((share, count), within)| (share, count - within.min(level)));
    surplus.filter(|(_, many)| *many > 0).collect()
}

/// Returns the size to which the largest shares are cut so that all together are at most `max`.
fn level(mut sizes: Vec<u64>, max: u64) -> u64 {
    sizes.sort_unstable();
    let (mut left, mut shares) = (max, sizes.len() as u64);
    for size in sizes {
        let part = left / shares;
        if size > part {
            return part;
        }
        (left, shares) = (left - size, shares - 1);
    }
    u64::MAX
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn share(number: usize) -> Option<Team> {
        // The last share of a list is as good as any for the nodes.
        (number > 0).then(|| format!("t{number}").parse().expect("team"))
    }

    proptest! {
        #[test]
        fn no_share_is_cut_for_others_below_an_equal_part(
            counts in prop::collection::vec(0_u64..500, 1..8),
            own in prop::option::of(0_u64..300),
            max in 1_u64..1000,
        ) {
            let counts: Vec<Count> =
                counts.into_iter().enumerate().map(|(n, count)| (share(n), count)).collect();
            // One team has a maximum of its own.
            let max_of = |team: &Team| own.filter(|_| team.as_str() == "t1");
            let lost = surplus(counts.clone(), max_of, max);
            let lost_by = |share: &Option<Team>| {
                lost.iter().find(|(of, _)| of == share).map_or(0, |(_, many)| *many)
            };
            let kept: Vec<u64> =
                counts.iter().map(|(share, count)| count - lost_by(share)).collect();
            prop_assert!(kept.iter().sum::<u64>() <= max);
            let part = max / counts.len() as u64;
            let most = kept.iter().copied().max().unwrap_or_default();
            for ((share, count), kept) in counts.iter().zip(&kept) {
                let own = share.as_ref().and_then(max_of).unwrap_or(u64::MAX);
                prop_assert!(*kept <= own);
                prop_assert!(*kept >= part.min(*count).min(own), "{share:?} keeps its part");
                // Who lost more than its own maximum says is among the largest.
                prop_assert!(*kept == own.min(*count) || *kept == most);
            }
        }
    }

    #[test]
    fn noisy_team_is_cut_and_quiet_ones_keep_all() {
        let counts = vec![(share(1), 900), (share(2), 30), (share(0), 20)];
        let lost = surplus(counts.clone(), |_| None, 500);
        assert_eq!(lost, [(share(1), 450)]);
        assert_eq!(surplus(counts.clone(), |_| None, 1000), []);
        let of_one = |team: &Team| (team.as_str() == "t2").then_some(10);
        assert_eq!(surplus(counts, of_one, 1000), [(share(2), 20)], "its own maximum");
        assert_eq!(surplus(Vec::new(), |_| None, 1000), []);
    }
}
