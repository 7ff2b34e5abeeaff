//! TOPSIS (Hwang and Yoon 1981): of alternatives with several criteria, chooses the one nearest to
//! the best and farthest from the worst values that occur. Here each criterion is a cost.

/// Returns the index of the best of `alternatives`, the first one among equals.
pub(crate) fn best<const C: usize>(alternatives: &[[f64; C]], weights: &[f64; C]) -> Option<usize> {
    let mut norms = [0.0; C];
    let (mut low, mut high) = ([f64::INFINITY; C], [f64::NEG_INFINITY; C]);
    for alternative in alternatives {
        for c in 0..C {
            norms[c] += alternative[c] * alternative[c];
            low[c] = low[c].min(alternative[c]);
            high[c] = high[c].max(alternative[c]);
        }
    }
    let total: f64 = weights.iter().sum();
    let scale: [f64; C] = std::array::from_fn(|c| {
        if norms[c] > 0.0 { weights[c] / total / norms[c].sqrt() } else { 0.0 }
    });
    let distance = |alternative: &[f64; C], from: &[f64; C]| {
        let square = |c: usize| ((alternative[c] - from[c]) * scale[c]).powi(2);
        (0..C).map(square).sum::<f64>().sqrt()
    };
    let closeness = |alternative: &[f64; C]| {
        let (good, bad) = (distance(alternative, &low), distance(alternative, &high));
        if good + bad > 0.0 { bad / (good + bad) } else { 1.0 }
    };
    let mut best: Option<(usize, f64)> = None;
    for (at, alternative) in alternatives.iter().enumerate() {
        let score = closeness(alternative);
        if best.is_none_or(|(_, before)| score > before) {
            best = Some((at, score));
        }
    }
    best.map(|(at, _)| at)
}
