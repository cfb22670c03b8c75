//! The only reader of wall time.
//!
//! Time is the wall clock at start plus `CLOCK_BOOTTIME` (it counts suspend, which `Instant` does not), slewed towards the
//! wall clock by at most 500 ppm. A step of the wall clock over [`STEP`] is not believed until the database's clock has
//! agreed with it within [`STEP`] for [`AGREE`]; until then the old time goes on and [`Clock::alarm`] says so.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// A difference above this is a step, not drift.
pub const STEP: Duration = Duration::from_secs(5);
/// How long the database must agree with a stepped clock before the step is taken.
pub const AGREE: Duration = Duration::from_secs(60);
/// How fast drift is corrected: 500 microseconds a second.
const SLEW_PPM: i64 = 500;

const FORMAT: &[BorrowedFormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

/// An instant, to the millisecond, UTC. Prints as RFC 3339 with exactly three decimals.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since 1970.
    #[must_use]
    pub const fn from_millis(ms: i64) -> Self {
        Self(ms)
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970, as JWT's NumericDate wants them.
    #[must_use]
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// This instant plus a duration.
    #[must_use]
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(d.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long ago `earlier` was, zero if it was not.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// As the time crate has it, for the database.
    #[must_use]
    pub fn to_offset(self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
    }

    /// From the time crate, cut to the millisecond.
    #[must_use]
    pub fn from_offset(t: OffsetDateTime) -> Self {
        Self(i64::try_from(t.unix_timestamp_nanos().div_euclid(1_000_000)).unwrap_or(0))
    }

    /// Reads RFC 3339 with any offset and any number of decimals.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok().map(Self::from_offset)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, ms) = (self.seconds(), self.0.rem_euclid(1000));
        let at = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        if !(0..=9999).contains(&at.year()) {
            return f.write_str(&self.to_offset().format(&FORMAT).map_err(|_| fmt::Error)?);
        }
        // Each entry has one: printed here it takes no string of its own.
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let mut put = |from: usize, to: usize, mut n: i64| {
            for digit in text[from..to].iter_mut().rev() {
                *digit = b'0' + (n % 10) as u8;
                n /= 10;
            }
        };
        put(0, 4, at.year().into());
        put(5, 7, u8::from(at.month()).into());
        put(8, 10, at.day().into());
        put(11, 13, at.hour().into());
        put(14, 16, at.minute().into());
        put(17, 19, at.second().into());
        put(20, 23, ms);
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text)
            .ok_or_else(|| serde::de::Error::custom("an RFC 3339 time is wanted, such as 2026-01-31T12:00:00.000Z"))
    }
}

/// Where a clock reads from; tests put their own here.
pub trait Source: Send + Sync {
    /// The wall clock, nanoseconds since 1970.
    fn wall(&self) -> i64;
    /// A clock that never steps and counts suspend, nanoseconds since boot.
    fn boot(&self) -> i64;
}

struct System;

impl Source for System {
    // By way of the C library, where who tests with another time (libfaketime, our suite) can put theirs; asked once a second.
    #[allow(clippy::disallowed_methods)]
    fn wall(&self) -> i64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    }

    fn boot(&self) -> i64 {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec)
    }
}

/// The daemon's clock. Cheap to clone; all clones are one clock.
#[derive(Clone)]
pub struct Clock {
    source: Arc<dyn Source>,
    state: Arc<Mutex<State>>,
}

struct State {
    wall_at_start: i64,
    boot_at_start: i64,
    slew: i64,
    disciplined_at: i64,
    /// Boot time since which the database has agreed with a stepped wall clock.
    agreed_since: Option<i64>,
    stepped: Option<Duration>,
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::from_source(Arc::new(System))
    }

    /// A clock on any source.
    #[must_use]
    pub fn from_source(source: Arc<dyn Source>) -> Self {
        let (wall, boot) = (source.wall(), source.boot());
        let state = State {
            wall_at_start: wall,
            boot_at_start: boot,
            slew: 0,
            disciplined_at: boot,
            agreed_since: None,
            stepped: None,
        };
        Self { source, state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let boot = self.source.boot();
        let s = self.lock();
        Timestamp((s.wall_at_start + (boot - s.boot_at_start) + s.slew).div_euclid(1_000_000))
    }

    /// Time that only passes: since an arbitrary point, counting suspend. For time-outs and leases.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(u64::try_from(self.source.boot()).unwrap_or(0))
    }

    /// Compares with the wall clock and corrects; `database` is its clock as read a moment ago, if it could be.
    /// Called about once a second.
    pub fn discipline(&self, database: Option<Timestamp>) {
        let (wall, boot) = (self.source.wall(), self.source.boot());
        let mut s = self.lock();
        let ours = s.wall_at_start + (boot - s.boot_at_start) + s.slew;
        let off = wall - ours;
        let step = i64::try_from(STEP.as_nanos()).unwrap_or(i64::MAX);
        let passed = (boot - s.disciplined_at).max(0);
        s.disciplined_at = boot;
        if off.abs() <= step {
            s.stepped = None;
            s.agreed_since = None;
            let most = passed.saturating_mul(SLEW_PPM) / 1_000_000;
            s.slew += off.clamp(-most, most);
            return;
        }
        s.stepped = Some(Duration::from_nanos(off.unsigned_abs()));
        let agrees = database.is_some_and(|d| (d.millis().saturating_mul(1_000_000) - wall).abs() <= step);
        if !agrees {
            s.agreed_since = None;
            return;
        }
        let since = *s.agreed_since.get_or_insert(boot);
        if boot - since >= i64::try_from(AGREE.as_nanos()).unwrap_or(i64::MAX) {
            s.slew += off;
            s.stepped = None;
            s.agreed_since = None;
        }
    }

    /// By how much the wall clock has stepped away, while the step is not believed.
    #[must_use]
    pub fn alarm(&self) -> Option<Duration> {
        self.lock().stepped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

    struct Fake {
        wall: AtomicI64,
        boot: AtomicI64,
    }
    impl Source for Fake {
        fn wall(&self) -> i64 {
            self.wall.load(SeqCst)
        }
        fn boot(&self) -> i64 {
            self.boot.load(SeqCst)
        }
    }
    const S: i64 = 1_000_000_000;

    fn fake() -> (Arc<Fake>, Clock) {
        let f = Arc::new(Fake { wall: AtomicI64::new(1_000_000 * S), boot: AtomicI64::new(0) });
        let c = Clock::from_source(f.clone());
        (f, c)
    }

    #[test]
    fn times_print_as_their_format_says() {
        let many = (-62_135_596_800_000_i64..=253_402_300_799_999).step_by(86_399_123_457);
        for ms in many.chain([-1, -999, -1000, 951_782_399_999, 951_782_400_000, 253_402_300_799_999]) {
            let at = Timestamp::from_millis(ms);
            let expected = at.to_offset().format(&FORMAT).unwrap();
            assert_eq!(at.to_string(), expected, "{ms}");
            assert_eq!(Timestamp::parse(&expected), Some(at));
        }
    }

    #[test]
    fn times_have_three_decimals() {
        assert_eq!(Timestamp::from_millis(0).to_string(), "1970-01-01T00:00:00.000Z");
        assert_eq!(
            Timestamp::parse("2026-01-02T03:04:05.678912+02:00").unwrap().to_string(),
            "2026-01-02T01:04:05.678Z"
        );
        assert_eq!(Timestamp::parse("yesterday"), None);
    }

    #[test]
    fn drift_is_slewed_slowly() {
        let (f, c) = fake();
        f.boot.store(S, SeqCst);
        f.wall.store(1_000_001 * S + S / 10, SeqCst); // 100 ms ahead
        c.discipline(None);
        assert_eq!(c.now().millis(), 1_000_001_000, "at most half a millisecond a second");
        assert_eq!(c.alarm(), None);
        for i in 2..=250 {
            f.boot.store(i * S, SeqCst);
            f.wall.store((1_000_000 + i) * S + S / 10, SeqCst);
            c.discipline(None);
        }
        assert_eq!(c.now().millis(), 1_000_250_100, "and in the end all of it");
    }

    #[test]
    fn a_step_is_taken_only_when_the_database_agrees_for_a_minute() {
        for hour in [3600, -3600] {
            let (f, c) = fake();
            for i in 1..=30 {
                f.boot.store(i * S, SeqCst);
                f.wall.store((1_000_000 + hour + i) * S, SeqCst);
                c.discipline(Some(Timestamp::from_millis((1_000_000 + i) * 1000)));
                assert_eq!(c.now().millis(), (1_000_000 + i) * 1000, "the old time goes on");
                assert_eq!(c.alarm(), Some(Duration::from_secs(3600)));
            }
            for i in 31..=91 {
                f.boot.store(i * S, SeqCst);
                f.wall.store((1_000_000 + hour + i) * S, SeqCst);
                c.discipline(Some(Timestamp::from_millis((1_000_000 + hour + i) * 1000)));
            }
            assert_eq!(c.now().millis(), (1_000_000 + hour + 91) * 1000);
            assert_eq!(c.alarm(), None);
        }
    }
}
