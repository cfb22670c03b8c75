//! A sieve over a segment: whether it can have a decision that a list asks for, said without reading its records.
//!
//! It is a Bloom filter over what the records are about, eight bits for each thing that is different: it never says no where there
//! is one, and yes in vain one time in fifty (more, where a thousand records are about thousands of things).

use smallvec::SmallVec;

use super::past::Filter;

/// The first byte. Another version is not understood, and passes everything.
const VERSION: u8 = 1;
/// Bits set for each thing, of those there are for each.
const SET: u64 = 4;
const BITS: usize = 8;
/// Bytes at most.
const MOST: usize = 2048;
/// Resources are asked for by the beginning of their id: these are in, where an id is as long.
const BEGINNINGS: [usize; 5] = [4, 8, 16, 32, 64];

/// What a decision is about, as far as lists ask for it.
pub(super) struct About<'a> {
    pub subject: &'a str,
    pub action: &'a str,
    pub resource: &'a str,
    pub policies: &'a [String],
    pub bundles: &'a [String],
    pub allowed: bool,
}

/// Things of a decision, hashed.
pub(super) type Things = SmallVec<[u64; 8]>;

#[derive(Clone, Copy)]
enum Kind {
    Subject,
    Action,
    Resource,
    Policy,
    Bundle,
    Decision,
}

/// FNV-1a, mixed: the same for ever, for it is stored. Who finds two that collide has a list read one segment more.
fn thing(kind: Kind, text: &[u8]) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    let hash = text.iter().fold(step(0xcbf2_9ce4_8422_2325, kind as u8), |hash, byte| step(hash, *byte));
    let hash = (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ hash >> 32
}

fn decision(allowed: bool) -> u64 {
    thing(Kind::Decision, &[u8::from(allowed)])
}

impl About<'_> {
    /// What goes into the sieve.
    pub fn things(&self) -> Things {
        let mut things = Things::new();
        things.push(thing(Kind::Subject, self.subject.as_bytes()));
        things.push(thing(Kind::Action, self.action.as_bytes()));
        let resource = self.resource.as_bytes();
        let beginnings = BEGINNINGS.iter().map_while(|n| resource.get(..*n));
        things.extend(beginnings.map(|beginning| thing(Kind::Resource, beginning)));
        things.extend(self.policies.iter().map(|p| thing(Kind::Policy, p.as_bytes())));
        things.extend(self.bundles.iter().map(|b| thing(Kind::Bundle, b.as_bytes())));
        things.push(decision(self.allowed));
        things
    }
}

/// What a filter asks for, as it is found in sieves.
pub(super) fn wanted(filter: &Filter) -> Things {
    let mut things = Things::new();
    let texts = [(Kind::Subject, &filter.subject), (Kind::Action, &filter.action), (Kind::Policy, &filter.policy)];
    for (kind, text) in texts.into_iter().chain([(Kind::Bundle, &filter.bundle)]) {
        things.extend(text.as_ref().map(|text| thing(kind, text.as_bytes())));
    }
    let beginning = |text: &String| BEGINNINGS.iter().rev().find_map(|n| text.as_bytes().get(..*n).map(<[u8]>::to_vec));
    things.extend(filter.resource.as_ref().and_then(beginning).map(|b| thing(Kind::Resource, &b)));
    things.extend(filter.decision.map(decision));
    things
}

/// The bits of a thing, of so many.
fn bits(thing: u64, of: usize) -> impl Iterator<Item = usize> {
    let (first, step) = (thing >> 32, (thing & 0xffff_ffff) | 1);
    let of = of as u64;
    (0..SET).map(move |i| usize::try_from((first + i * step) % of).unwrap_or_default())
}

/// The sieve of decisions about these things.
pub(super) fn make(mut things: Vec<u64>) -> Vec<u8> {
    things.sort_unstable();
    things.dedup();
    let bytes = (things.len() * BITS).div_ceil(8).clamp(8, MOST);
    let mut sieve = vec![0; 1 + bytes];
    sieve[0] = VERSION;
    for bit in things.into_iter().flat_map(|thing| bits(thing, bytes * 8)) {
        sieve[1 + bit / 8] |= 1 << (bit % 8);
    }
    sieve
}

/// Whether one of the decisions can be about all of what is wanted. Without a sieve it can.
pub(super) fn passes(sieve: &[u8], wanted: &[u64]) -> bool {
    let Some((&VERSION, set)) = sieve.split_first() else { return true };
    let has = |thing: u64| bits(thing, set.len() * 8).all(|bit| set[bit / 8] & 1 << (bit % 8) != 0);
    set.is_empty() || wanted.iter().all(|thing| has(*thing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    struct One {
        subject: String,
        action: String,
        resource: String,
        policies: Vec<String>,
        bundles: Vec<String>,
        allowed: bool,
    }

    impl One {
        fn about(&self) -> About<'_> {
            let Self { subject, action, resource, policies, bundles, allowed } = self;
            About { subject, action, resource, policies, bundles, allowed: *allowed }
        }
    }

    fn one() -> impl Strategy<Value = One> {
        let texts = || prop::collection::vec("[a-z]{1,6}", 0..3);
        ("\\PC{1,12}", "[a-z]{1,8}", "\\PC{1,80}", texts(), texts(), any::<bool>()).prop_map(
            |(subject, action, resource, policies, bundles, allowed)| One {
                subject,
                action,
                resource,
                policies,
                bundles,
                allowed,
            },
        )
    }

    /// A sieve over these, and some more.
    fn sieve(all: &[One]) -> Vec<u8> {
        make(all.iter().flat_map(|one| one.about().things()).collect())
    }

    proptest! {
        #[test]
        fn what_is_in_passes_by_whatever_it_is_asked_for(
            all in prop::collection::vec(one(), 1..60), which in any::<prop::sample::Index>(), mask in 0u8..64, cut in 0usize..90,
        ) {
            let one = which.get(&all);
            let asked = |bit: u8, text: &String| (mask & 1 << bit != 0).then(|| text.clone());
            let beginning: String = one.resource.chars().take(cut).collect();
            let filter = Filter {
                subject: asked(0, &one.subject),
                action: asked(1, &one.action),
                resource: asked(2, &beginning),
                policy: one.policies.first().and_then(|p| asked(3, p)),
                bundle: one.bundles.last().and_then(|b| asked(4, b)),
                decision: (mask & 1 << 5 != 0).then_some(one.allowed),
                ..Filter::default()
            };
            prop_assert!(passes(&sieve(&all), &wanted(&filter)));
        }
    }

    /// A thousand decisions of which each has a subject and a resource of its own.
    fn many() -> Vec<One> {
        let each = |n: usize| One {
            subject: format!("user-{n}"),
            action: "view".into(),
            resource: format!("doc/{n:06}"),
            policies: vec!["view".into()],
            bundles: vec!["b".into()],
            allowed: true,
        };
        (0..1000).map(each).collect()
    }

    #[test]
    fn what_is_not_in_hardly_passes_and_the_sieve_is_small() {
        let sieve = sieve(&many());
        assert!(sieve.len() <= 1 + MOST, "{}", sieve.len());
        let subject = |n: usize| Filter { subject: Some(format!("other-{n}")), ..Filter::default() };
        let passed = (0..10_000).filter(|n| passes(&sieve, &wanted(&subject(*n)))).count();
        assert!(passed < 500, "{passed} of 10,000 pass");
        assert!(!passes(&sieve, &wanted(&Filter { decision: Some(false), ..Filter::default() })));
        assert!(super::make(many()[0].about().things().to_vec()).len() < 20, "one decision takes few bytes");
    }

    #[test]
    fn what_is_no_sieve_passes_everything() {
        let filter = wanted(&Filter { subject: Some("nobody".into()), ..Filter::default() });
        for none in [&[][..], &[VERSION], &[VERSION + 1, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(passes(none, &filter), "{none:?}");
        }
        assert!(!passes(&[VERSION, 0, 0, 0, 0, 0, 0, 0, 0], &filter));
    }
}
