//! Work on many things, in order, on several cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::kernel::supervisor::STACK;

/// Cores used at most: others ask something meanwhile.
pub(super) const CORES: usize = 4;
/// Things taken at a time.
const BLOCK: usize = 32;

/// What `work` makes of each, in their order; of the first of them only, if it was `late` before all were done. Not for where
/// others wait on this thread.
pub(super) fn spread<T: Sync, R: Send>(
    items: &[T],
    cores: usize,
    late: impl Fn() -> bool + Sync,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    // A block that was taken is done, and they are taken in order: so what is done has no gap.
    let run = || {
        let mut done = Vec::new();
        while !late() {
            let from = next.fetch_add(BLOCK, Ordering::Relaxed);
            let Some(block) = items.get(from..items.len().min(from + BLOCK)).filter(|b| !b.is_empty()) else { break };
            done.push((from, block.iter().map(&work).collect::<Vec<R>>()));
        }
        done
    };
    let cores = thread::available_parallelism().map_or(1, usize::from).min(cores).min(items.len().div_ceil(BLOCK));
    let mut done = thread::scope(|scope| {
        // One core less, where the system has no thread to give: what is left to do is done by the others.
        let start = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..cores).filter_map(start).collect();
        let mut done = run();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(from, _)| *from);
    done.into_iter().flat_map(|(_, block)| block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_done_in_order_or_the_first_of_them() {
        for count in [0, 1, BLOCK, 10 * BLOCK + 7] {
            let items: Vec<usize> = (0..count).collect();
            assert_eq!(spread(&items, CORES, || false, |n| n + 1), (1..=count).collect::<Vec<_>>());
        }
        let (items, seen): (Vec<usize>, _) = ((0..1000).collect(), AtomicUsize::new(0));
        let late = || seen.load(Ordering::Relaxed) > 100;
        let some = spread(&items, CORES, late, |n| {
            seen.fetch_add(1, Ordering::Relaxed);
            *n
        });
        assert!((101..1000).contains(&some.len()), "{}", some.len());
        assert_eq!(some, items[..some.len()]);
    }
}
